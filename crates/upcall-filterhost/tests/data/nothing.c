/* Compiled to see whether the compiler can. */
#include <stdio.h>
int nothing(void);
int nothing(void) { return puts("") < 0; }
