"""A process whose clock is wrong: a library of a few lines in front of libc's, and the environment that loads it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long shift(void) { const char *given = getenv("SHIFT_SECONDS"); return given ? atol(given) : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &precise)) return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""

COMPILER = shutil.which("cc") or shutil.which("gcc")


def shifted(directory: Path, seconds: int) -> dict[str, str]:
    """Return the environment of a process whose wall clock is off by so much; its monotonic clock is right."""
    if COMPILER is None:
        raise RuntimeError("there is no C compiler")
    source, library = directory / "clock.c", directory / "clock.so"
    if not library.exists():
        source.write_text(SOURCE)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return {"LD_PRELOAD": str(library), "SHIFT_SECONDS": str(seconds)}
