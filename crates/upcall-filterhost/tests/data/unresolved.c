/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Needs a function that no library has. */
int function_that_nobody_has(void);
int upcall_filter(void);
int upcall_filter(void) { return function_that_nobody_has(); }
