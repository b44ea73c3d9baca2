/* Let chosen system calls on chosen files fail, as a disk that is full, or broken, would let them.

   From the environment:
     FAULTS_NAME   part of the file's path; calls on other files pass
     FAULTS_CALLS  names of calls, separated by commas: read, write, sync, reserve
     FAULTS_CODE   the error number
     FAULTS_AFTER  how many such calls of a process pass first
     FAULTS_WHILE  a file: only while it is there do calls fail
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long passed;

static int fails(const char *call, int fd) {
    const char *name = getenv("FAULTS_NAME"), *calls = getenv("FAULTS_CALLS"), *code = getenv("FAULTS_CODE");
    const char *after = getenv("FAULTS_AFTER"), *during = getenv("FAULTS_WHILE");
    char link[64], path[4096];
    ssize_t size;
    int kept = errno;
    if (!name || !calls || !code || !strstr(calls, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, sizeof path - 1);
    if (size < 0) { errno = kept; return 0; }
    path[size] = 0;
    if (!strstr(path, name) || (during && access(during, F_OK))) { errno = kept; return 0; }
    if (after && __atomic_fetch_add(&passed, 1, __ATOMIC_SEQ_CST) < atol(after)) { errno = kept; return 0; }
    errno = atoi(code);
    return 1;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define READ(name, kind) \
    ssize_t name(int fd, void *buffer, size_t size, kind offset) { \
        REAL(ssize_t, #name, int, void *, size_t, kind); \
        return fails("read", fd) ? -1 : real(fd, buffer, size, offset); \
    }
#define READV(name, kind) \
    ssize_t name(int fd, const struct iovec *parts, int count, kind offset) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, kind); \
        return fails("read", fd) ? -1 : real(fd, parts, count, offset); \
    }
#define READV2(name, kind) \
    ssize_t name(int fd, const struct iovec *parts, int count, kind offset, int flags) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, kind, int); \
        return fails("read", fd) ? -1 : real(fd, parts, count, offset, flags); \
    }
#define WRITE(name, kind) \
    ssize_t name(int fd, const void *buffer, size_t size, kind offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, kind); \
        return fails("write", fd) ? -1 : real(fd, buffer, size, offset); \
    }
#define RESERVE(name, kind) \
    int name(int fd, int mode, kind start, kind size) { \
        REAL(int, #name, int, int, kind, kind); \
        return fails("reserve", fd) ? -1 : real(fd, mode, start, size); \
    }
#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        return fails("sync", fd) ? -1 : real(fd); \
    }

READ(pread, off_t)
READ(pread64, off64_t)
READV(preadv, off_t)
READV(preadv64, off64_t)
READV2(preadv2, off_t)
READV2(preadv64v2, off64_t)
WRITE(pwrite, off_t)
WRITE(pwrite64, off64_t)
RESERVE(fallocate, off_t)
RESERVE(fallocate64, off64_t)
SYNC(fsync)
SYNC(fdatasync)
