/* Counts the calls by which a process changes files below one folder, and at the n-th kills it or fails; refuses threads
   from the n-th on; turns the clock back.

   Preloaded into the fork server; the `faults_...` functions are called in a child through ctypes, so nothing is counted
   before. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, FSYNC = 2, RENAME = 4 };
enum { COUNT = 0, KILL = 1, FULL = 2 };

static int kinds, action;
static long struck_at;
static atomic_long calls;
static char root[4096];

void faults_arm(int wanted_kinds, long at, int wanted_action, const char *folder) {
    snprintf(root, sizeof root, "%s", folder);
    struck_at = at;
    action = wanted_action;
    atomic_store(&calls, 0);
    kinds = wanted_kinds;
}

static atomic_long threads_left = -1, readings_left = -1;
static long turned_back;

void faults_limit_threads(long count) { atomic_store(&threads_left, count); }

void faults_turn_clock(long after, long seconds) {
    turned_back = seconds;
    atomic_store(&readings_left, after);
}

/* How many seconds the clock is back at this reading. */
static long seconds_back(void) {
    if (!turned_back) return 0;
    return atomic_load(&readings_left) > 0 && atomic_fetch_sub(&readings_left, 1) > 0 ? 0 : turned_back;
}

long faults_calls(void) { return atomic_load(&calls); }

static int is_below(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, root, strlen(root)) == 0;
}

/* Whether this call fails; a disk that is full stays full. */
static int strikes(int kind) {
    if (!(kinds & kind)) return 0;
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (action == KILL && call == struck_at) kill(getpid(), SIGKILL);
    if (action == FULL && call >= struck_at) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ON_FILE(kind, descriptor) ((kinds & (kind)) && is_below(descriptor) && strikes(kind))

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return ON_FILE(WRITE, fd) ? -1 : real(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    REAL(pwrite64);
    return ON_FILE(WRITE, fd) ? -1 : real(fd, data, size, place);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    REAL(pwrite);
    return ON_FILE(WRITE, fd) ? -1 : real(fd, data, size, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return ON_FILE(WRITE, fd) ? -1 : real(fd, parts, count);
}
ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
    REAL(sendfile64);
    return ON_FILE(WRITE, to) ? -1 : real(to, from, place, size);
}
ssize_t sendfile(int to, int from, off_t *place, size_t size) {
    REAL(sendfile);
    return ON_FILE(WRITE, to) ? -1 : real(to, from, place, size);
}
int fsync(int fd) {
    REAL(fsync);
    return ON_FILE(FSYNC, fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return ON_FILE(FSYNC, fd) ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return strikes(RENAME) ? -1 : real(from, to);
}
int renameat(int from, const char *name, int to, const char *target) {
    REAL(renameat);
    return strikes(RENAME) ? -1 : real(from, name, to, target);
}
int link(const char *from, const char *to) {
    REAL(link);
    return strikes(RENAME) ? -1 : real(from, to);
}
int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*start)(void *), void *argument) {
    REAL(pthread_create);
    if (atomic_load(&threads_left) >= 0 && atomic_fetch_sub(&threads_left, 1) <= 0) {
        atomic_store(&threads_left, 0);
        return EAGAIN;
    }
    return real(thread, how, start, argument);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec -= seconds_back();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int failed = real(now, zone);
    if (!failed) now->tv_sec -= seconds_back();
    return failed;
}
time_t time(time_t *out) {
    REAL(time);
    time_t now = real(NULL) - seconds_back();
    if (out) *out = now;
    return now;
}
