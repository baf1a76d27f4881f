/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What testfilter.c does with a request at block N; see there. */
#ifndef TESTFILTER_H
#define TESTFILTER_H

#include <stdbool.h>

enum behaviour {
    T_PASS,              /* PASS */
    T_WATCH,             /* WATCH with a context; io_done checks it, PASS */
    T_DONE,              /* DONE */
    T_FAIL,              /* FAIL -ENOSPC */
    T_HOLD_UNTIL_CANCEL, /* HOLD; cancel answers FAIL -ECANCELED */
    T_OTHER_THREAD,      /* HOLD; another thread answers PASS after 2 ms */
    T_RACING_THREAD,     /* HOLD; another thread answers PASS at once */
    T_EARLY,             /* answer(FAIL, -ENOTEMPTY), then HOLD */
    T_EARLY_THREAD,      /* HOLD, after another thread answered PASS */
    T_EARLY_AND_PASS,    /* answer(FAIL, -ENOTEMPTY), then PASS: a mistake */
    T_TWICE,             /* HOLD; blocking work answers PASS twice: a mistake */
    T_ISSUE,             /* HOLD; reads 65536 below; DONE if "below" stands there */
    T_FLOOD,             /* issues flushes until -EAGAIN; FAIL -(how many) */
    T_FLOOD_BACK,        /* FAIL -(how many of these came back) */
    T_TIMER,             /* HOLD; a timer answers DONE after 20 ms */
    T_FD_WATCH,          /* HOLD; a watched pipe answers PASS */
    T_BLOCKING,          /* HOLD; blocking work answers WATCH; io_done DONE */
    T_INVERT,            /* inverts the data; PASS */
    T_NONSENSE,          /* returns 256 */
    T_DONE_HOLD,         /* WATCH; io_done HOLD, answered PASS by another thread */
    T_DONE_STATUS,       /* WATCH; io_done PASS with -EDOM */
    T_DONE_FAIL,         /* WATCH; io_done FAIL with -EXDEV */
    T_SERVICES,          /* checks the services; DONE, or FAIL -(line) */
    T_LOG_FLOOD,         /* 500 log lines; PASS */
    T_SEES,              /* FAIL with -(first byte of data), or -ENODATA */
    T_FEED,              /* HOLD; a thread adds 20000 to a counter, answers PASS */
    T_WORK,              /* PASS; blocking work that adds to "worked" after 50 ms */
    T_KEEP,              /* HOLD until T_RELEASE */
    T_RELEASE,           /* answers all that T_KEEP holds with DONE, from within; PASS */
    T_ISSUE_ONE,         /* issues one flush and forgets it; PASS */
    T_SLOW,              /* PASS, after 1 ms */
    T_UNUSED
};

#endif
