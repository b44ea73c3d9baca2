/* A shim for LD_PRELOAD that counts the calls which change files in one folder, and ends a process at one of them.
 *
 * All processes of a run share one control block, a small file named by LAZYPROC_DEATHS and mapped into each of them,
 * so they share one count. Call number `at` is the point of death: before the call, half-way through it (half of the
 * bytes of a write), or after it. Instead, or as well, all calls are recorded with their bytes, for a replay.
 * With `skip_syncs` all syncs are left out; else their time is added up. The layout of `struct control` and `struct event` is known to shim.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { BEFORE, HALF, AFTER };
enum { CALLER, DRIVER, EVERYBODY };           /* who dies */
enum { ALL, DRIVERS, WORKERS };               /* whose calls count */
enum { WRITE = 1, TRUNCATE, SYNC, DATASYNC, CREATE, RENAME, LINK, UNLINK, NOTE };

struct control {
    int32_t armed, moment, victim, counted, driver, record, skip_syncs, lock;
    int64_t count, at, died_kind, syncs;
    double sync_seconds;
    char folder[PATH_MAX], record_path[PATH_MAX], died_path[PATH_MAX];
};

struct event {
    int32_t kind, pid;
    uint64_t inode;
    int64_t offset, size, count; /* bytes that follow the two paths; the number of the call */
    int32_t path_size, other_size;
    double time;
};

static struct control *control;
static int record_descriptor = -1;

#define REAL(result, name, ...) \
    typedef result (*name##_type)(__VA_ARGS__); \
    static name##_type real_##name; \
    static name##_type get_##name(void) { \
        if (!real_##name) real_##name = (name##_type)dlsym(RTLD_NEXT, #name); \
        return real_##name; \
    }

REAL(ssize_t, write, int, const void *, size_t)
REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)
REAL(ssize_t, writev, int, const struct iovec *, int)
REAL(ssize_t, pwritev64, int, const struct iovec *, int, off64_t)
REAL(ssize_t, pwritev64v2, int, const struct iovec *, int, off64_t, int)
REAL(int, ftruncate64, int, off64_t)
REAL(int, truncate64, const char *, off64_t)
REAL(int, fsync, int)
REAL(int, fdatasync, int)
REAL(int, openat64, int, const char *, int, ...)
REAL(int, renameat, int, const char *, int, const char *)
REAL(int, renameat2, int, const char *, int, const char *, unsigned int)
REAL(int, linkat, int, const char *, int, const char *, int)
REAL(int, unlinkat, int, const char *, int)

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("LAZYPROC_DEATHS");
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED) control = mapped;
    close(descriptor);
}

static int armed(void) { return control && __atomic_load_n(&control->armed, __ATOMIC_ACQUIRE); }

/* Does a path lie in the folder? The folder itself counts: it is synced. */
static int inside(const char *path) {
    size_t length = strlen(control->folder);
    return length && !strncmp(path, control->folder, length) && (path[length] == '/' || !path[length]);
}

static int path_of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0 && inside(path);
}

static int path_of_name(int folder, const char *name, char *path) {
    char copy[PATH_MAX], base[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", name);
    char *slash = strrchr(copy, '/');
    snprintf(base, sizeof base, "%s", slash ? slash + 1 : copy);
    path[0] = 0;
    if (slash && slash != copy) *slash = 0;
    if (name[0] == '/') {
        if (!realpath(slash == copy ? "/" : copy, path)) return 0;
    } else {
        char start[PATH_MAX], joined[PATH_MAX + PATH_MAX];
        if (folder == AT_FDCWD) { if (!getcwd(start, sizeof start)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, start, sizeof start - 1);
            if (length < 0) return 0;
            start[length] = 0;
        }
        snprintf(joined, sizeof joined, "%s/%s", start, slash ? copy : ".");
        if (!realpath(joined, path)) return 0;
    }
    size_t length = strlen(path);
    if (length + strlen(base) + 2 > PATH_MAX) return 0;
    path[length] = '/';
    strcpy(path + length + 1, base);
    return inside(path);
}

/* -- recording: one call at a time, so that the order of the record is that of the calls ------------------------- */

static void begin_record(void) {
    if (!control->record) return;
    int32_t nobody = 0;
    while (!__atomic_compare_exchange_n(&control->lock, &nobody, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        nobody = 0;
        sched_yield();
    }
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void put(const void *data, size_t size) {
    const char *next = data;
    while (size) {
        ssize_t done = syscall(SYS_write, record_descriptor, next, size);
        if (done <= 0) abort();
        next += done;
        size -= (size_t)done;
    }
}

static void end_record(int kind, int64_t count, uint64_t inode, const char *path, const char *other, int64_t offset,
                       const struct iovec *parts, int n_parts, int64_t size) {
    if (!control->record) return;
    if (record_descriptor < 0)
        record_descriptor = (int)syscall(SYS_openat, AT_FDCWD, control->record_path,
                                         O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    struct event event = {
        .kind = kind, .pid = getpid(), .inode = inode, .offset = offset, .size = parts ? size : 0, .count = count,
        .path_size = (int32_t)strlen(path), .other_size = (int32_t)strlen(other),
        .time = seconds_now(),
    };
    put(&event, sizeof event);
    put(path, strlen(path));
    put(other, strlen(other));
    for (int i = 0; parts && i < n_parts && size > 0; i++) {
        size_t here = parts[i].iov_len < (size_t)size ? parts[i].iov_len : (size_t)size;
        put(parts[i].iov_base, here);
        size -= (int64_t)here;
    }
    __atomic_store_n(&control->lock, 0, __ATOMIC_RELEASE);
}

static void drop_record(void) {
    if (control->record) __atomic_store_n(&control->lock, 0, __ATOMIC_RELEASE);
}

static uint64_t inode_of(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) ? 0 : (uint64_t)status.st_ino;
}

static uint64_t inode_at(const char *path) {
    struct stat status;
    return lstat(path, &status) ? 0 : (uint64_t)status.st_ino;
}

/* -- counting and dying ------------------------------------------------------------------------------------------ */

static int64_t next_count(void) {
    int is_driver = getpid() == control->driver;
    if (control->counted == DRIVERS && !is_driver) return -1;
    if (control->counted == WORKERS && is_driver) return -1;
    return __atomic_add_fetch(&control->count, 1, __ATOMIC_ACQ_REL);
}

static int is_point(int64_t count, int moment) { return count > 0 && count == control->at && moment == control->moment; }

static void die(int kind, const char *path) {
    control->died_kind = kind;
    snprintf(control->died_path, sizeof control->died_path, "%s", path);
    if (control->victim != CALLER) {
        pid_t driver = control->driver;
        if (control->victim == EVERYBODY) kill(-driver, SIGKILL);
        else kill(driver, SIGKILL);
        if (getpid() != driver) return; /* a worker whose driver has died goes on with what it is doing */
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void maybe_die(int64_t count, int moment, int kind, const char *path) {
    if (is_point(count, moment)) die(kind, path);
}

/* -- writes: all become one form --------------------------------------------------------------------------------- */

static int64_t total(const struct iovec *parts, int n_parts) {
    int64_t size = 0;
    for (int i = 0; i < n_parts; i++) size += (int64_t)parts[i].iov_len;
    return size;
}

/* Write the first `size` bytes of the parts. */
static void write_some(int descriptor, const struct iovec *parts, int n_parts, int64_t size, int64_t offset) {
    for (int i = 0; i < n_parts && size > 0; i++) {
        size_t here = parts[i].iov_len < (size_t)size ? parts[i].iov_len : (size_t)size;
        const char *data = parts[i].iov_base;
        while (here) {
            ssize_t done = offset < 0 ? get_write()(descriptor, data, here)
                                      : get_pwrite64()(descriptor, data, here, offset);
            if (done <= 0) return;
            data += done;
            here -= (size_t)done;
            size -= done;
            if (offset >= 0) offset += done;
        }
    }
}

/* Where a write without an offset goes. */
static int64_t place_of(int descriptor) {
    struct stat status;
    if (fcntl(descriptor, F_GETFL) & O_APPEND) return fstat(descriptor, &status) ? 0 : (int64_t)status.st_size;
    return (int64_t)lseek(descriptor, 0, SEEK_CUR);
}

#define CHANGE_BY_WRITE(descriptor, parts, n_parts, at_offset, call) \
    do { \
        char path[PATH_MAX]; \
        if (!armed() || !path_of_descriptor(descriptor, path)) return call; \
        int64_t count = next_count(); \
        maybe_die(count, BEFORE, WRITE, path); \
        if (is_point(count, HALF)) { \
            write_some(descriptor, parts, n_parts, total(parts, n_parts) / 2, at_offset); \
            die(WRITE, path); \
            if ((at_offset) < 0) lseek(descriptor, -(total(parts, n_parts) / 2), SEEK_CUR); \
        } \
        begin_record(); \
        int64_t place = (at_offset) < 0 ? place_of(descriptor) : (at_offset); \
        ssize_t result = call; \
        int error = errno; \
        if (result > 0) end_record(WRITE, count, inode_of(descriptor), path, "", place, parts, n_parts, result); \
        else drop_record(); \
        maybe_die(count, AFTER, WRITE, path); \
        errno = error; \
        return result; \
    } while (0)

ssize_t write(int descriptor, const void *data, size_t size) {
    struct iovec part = {(void *)data, size};
    CHANGE_BY_WRITE(descriptor, &part, 1, -1, get_write()(descriptor, data, size));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    struct iovec part = {(void *)data, size};
    CHANGE_BY_WRITE(descriptor, &part, 1, offset, get_pwrite64()(descriptor, data, size, offset));
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    return pwrite64(descriptor, data, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int n_parts) {
    CHANGE_BY_WRITE(descriptor, parts, n_parts, -1, get_writev()(descriptor, parts, n_parts));
}

ssize_t pwritev64(int descriptor, const struct iovec *parts, int n_parts, off64_t offset) {
    CHANGE_BY_WRITE(descriptor, parts, n_parts, offset, get_pwritev64()(descriptor, parts, n_parts, offset));
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int n_parts, off_t offset) {
    return pwritev64(descriptor, parts, n_parts, offset);
}

ssize_t pwritev64v2(int descriptor, const struct iovec *parts, int n_parts, off64_t offset, int flags) {
    CHANGE_BY_WRITE(descriptor, parts, n_parts, offset, get_pwritev64v2()(descriptor, parts, n_parts, offset, flags));
}

ssize_t pwritev2(int descriptor, const struct iovec *parts, int n_parts, off_t offset, int flags) {
    return pwritev64v2(descriptor, parts, n_parts, offset, flags);
}

/* -- everything else --------------------------------------------------------------------------------------------- */

#define CHANGE(kind, path, other, inode, value, call) \
    do { \
        int64_t count = next_count(); \
        maybe_die(count, BEFORE, kind, path); \
        begin_record(); \
        uint64_t number = inode; \
        int result = call; \
        int error = errno; \
        if (result >= 0) end_record(kind, count, number ? number : inode_at(path), path, other, value, NULL, 0, 0); \
        else drop_record(); \
        maybe_die(count, AFTER, kind, path); \
        errno = error; \
        return result; \
    } while (0)

int ftruncate64(int descriptor, off64_t size) {
    char path[PATH_MAX];
    if (!armed() || !path_of_descriptor(descriptor, path)) return get_ftruncate64()(descriptor, size);
    CHANGE(TRUNCATE, path, "", inode_of(descriptor), size, get_ftruncate64()(descriptor, size));
}

int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int truncate64(const char *name, off64_t size) {
    char path[PATH_MAX];
    if (!armed() || !path_of_name(AT_FDCWD, name, path)) return get_truncate64()(name, size);
    CHANGE(TRUNCATE, path, "", inode_at(path), size, get_truncate64()(name, size));
}

int truncate(const char *name, off_t size) { return truncate64(name, size); }

/* How long syncs take all in all: they are the driver's, so nobody else adds at the same time. */
static int timed_sync(int (*sync)(int), int descriptor) {
    if (control->skip_syncs) return 0;
    double begin = seconds_now();
    int result = sync(descriptor);
    control->sync_seconds += seconds_now() - begin;
    control->syncs++;
    return result;
}

int fsync(int descriptor) {
    char path[PATH_MAX];
    if (!armed() || !path_of_descriptor(descriptor, path)) return get_fsync()(descriptor);
    CHANGE(SYNC, path, "", inode_of(descriptor), 0, timed_sync(get_fsync(), descriptor));
}

int fdatasync(int descriptor) {
    char path[PATH_MAX];
    if (!armed() || !path_of_descriptor(descriptor, path)) return get_fdatasync()(descriptor);
    CHANGE(DATASYNC, path, "", inode_of(descriptor), 0, timed_sync(get_fdatasync(), descriptor));
}

/* Opening changes something where it makes a file, or empties one. */
static int open_any(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    struct stat status;
    if (!armed() || !(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE ||
        !path_of_name(folder, name, path))
        return get_openat64()(folder, name, flags, mode);
    int there = !stat(path, &status);
    if (there && !((flags & O_TRUNC) && status.st_size)) return get_openat64()(folder, name, flags, mode);
    if (there) CHANGE(TRUNCATE, path, "", (uint64_t)status.st_ino, 0, get_openat64()(folder, name, flags, mode));
    CHANGE(CREATE, path, "", 0, 0, get_openat64()(folder, name, flags, mode));
}

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list list; \
        va_start(list, flags); \
        mode = (mode_t)va_arg(list, int); \
        va_end(list); \
    }

int open(const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_any(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_any(AT_FDCWD, name, flags, mode);
}

int openat(int folder, const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_any(folder, name, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_any(folder, name, flags, mode);
}

int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int creat64(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int rename_any(int old_folder, const char *old, int new_folder, const char *new, unsigned int flags) {
    char from[PATH_MAX], to[PATH_MAX];
    int is_from = armed() && path_of_name(old_folder, old, from), is_to = armed() && path_of_name(new_folder, new, to);
    if (!is_from && !is_to)
        return flags ? get_renameat2()(old_folder, old, new_folder, new, flags)
                     : get_renameat()(old_folder, old, new_folder, new);
    CHANGE(RENAME, from, to, inode_at(from), 0,
           flags ? get_renameat2()(old_folder, old, new_folder, new, flags)
                 : get_renameat()(old_folder, old, new_folder, new));
}

int rename(const char *old, const char *new) { return rename_any(AT_FDCWD, old, AT_FDCWD, new, 0); }

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    return rename_any(old_folder, old, new_folder, new, 0);
}

int renameat2(int old_folder, const char *old, int new_folder, const char *new, unsigned int flags) {
    return rename_any(old_folder, old, new_folder, new, flags);
}

int linkat(int old_folder, const char *old, int new_folder, const char *new, int flags) {
    char from[PATH_MAX], to[PATH_MAX];
    if (!armed() || !path_of_name(new_folder, new, to)) return get_linkat()(old_folder, old, new_folder, new, flags);
    path_of_name(old_folder, old, from);
    CHANGE(LINK, from, to, inode_at(from), 0, get_linkat()(old_folder, old, new_folder, new, flags));
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!armed() || !path_of_name(folder, name, path)) return get_unlinkat()(folder, name, flags);
    CHANGE(UNLINK, path, "", inode_at(path), 0, get_unlinkat()(folder, name, flags));
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

/* -- for the driver ---------------------------------------------------------------------------------------------- */

/* Put a text into the record, in its place among the calls. */
void deaths_note(const char *text) {
    if (!armed() || !control->record) return;
    begin_record();
    end_record(NOTE, __atomic_load_n(&control->count, __ATOMIC_ACQUIRE), 0, text, "", 0, NULL, 0, 0);
}
