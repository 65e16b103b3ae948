/* What a test changes of the machine for one process: the wall clock, and where a name leads. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Whether the file exists that this variable names. */
static int is_on(const char *variable) {
    const char *file = getenv(variable);
    return file && access(file, F_OK) == 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME && is_on("TEST_CLOCK_AN_HOUR_OFF")) now->tv_sec += 3600;
    return result;
}

int getaddrinfo(const char *name, const char *port, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!real) real = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(RTLD_NEXT, "getaddrinfo");
    if (name && strcmp(name, "moving.test") == 0) name = is_on("TEST_NAME_HAS_MOVED") ? "127.0.0.2" : "127.0.0.1";
    return real(name, port, hints, found);
}
