/* A disk that fails on demand: loaded with LD_PRELOAD, it counts what a process changes below one folder, and lets
 * operations of its choice fail. Armed from inside the process by calls of the fault_... functions (faulty_disk.py).
 *
 * What libc does inside itself (the writes behind fwrite) does not come by here; opening the file does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];         /* empty: nothing is watched */
static long number, armed = -1, fired, fired_at = -1;
static int fault, sticky, half;
static char failing[256];             /* names of the operations that can fail, with a space around each */
static char *journal;                 /* a line for each operation: its name and its path */
static size_t used, room;

/* Watch what lies below this folder; an empty path watches nothing. */
void fault_folder(const char *path) {
    pthread_mutex_lock(&lock);
    snprintf(folder, sizeof folder, "%s", path);
    pthread_mutex_unlock(&lock);
}

/* Count from 0 again, and let the first operation from the n-th on that is one of `names` fail with `error`: that one
 * alone, or it and all such after it (`always`). `short_first`: a write as the first one writes half before. n of -1
 * lets nothing fail. */
void fault_arm(long n, int error, int always, int short_first, const char *names) {
    pthread_mutex_lock(&lock);
    number = 0, armed = n, fired = 0, fired_at = -1, fault = error, sticky = always, half = short_first, used = 0;
    snprintf(failing, sizeof failing, " %s ", names);
    pthread_mutex_unlock(&lock);
}

long fault_count(void) { return number; }
long fault_fired(void) { return fired; }
long fault_fired_at(void) { return fired_at; }

/* Lines since fault_arm(); valid until the next operation. */
const char *fault_journal(void) { return used ? journal : ""; }

static void note(const char *name, const char *path) {
    size_t needed = strlen(name) + strlen(path) + 3;
    if (used + needed > room) {
        room = 2 * (used + needed);
        journal = realloc(journal, room);
        if (!journal) abort();
    }
    used += (size_t)sprintf(journal + used, "%s %s\n", name, path);
}

/* Whether the operation fails, with errno set. `bytes`, of a write, is lowered where it is to be cut short first. */
static int fails(const char *name, const char *path, size_t *bytes) {
    size_t length = strlen(folder);
    char wanted[32];
    int hit = 0;
    if (!length || strncmp(path, folder, length) || (path[length] != '/' && path[length])) return 0;
    snprintf(wanted, sizeof wanted, " %s ", name);
    pthread_mutex_lock(&lock);
    note(name, path);
    if (armed >= 0 && number >= armed && strstr(failing, wanted) && (sticky || !fired)) {
        hit = 1;
        if (!fired++) fired_at = number;
        if (half && fired == 1 && bytes && *bytes > 1) {
            *bytes /= 2;
            hit = 0;
        }
    }
    number++;
    pthread_mutex_unlock(&lock);
    if (hit) errno = fault;
    return hit;
}

static const char *of_fd(int fd, char *path) {
    char link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size > 0 ? size : 0] = 0;
    errno = before;
    return path;
}

static const char *of_name(int at, const char *name, char *path) {
    char start[PATH_MAX];
    int before = errno;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        if (at != AT_FDCWD) of_fd(at, start);
        else if (!getcwd(start, sizeof start)) start[0] = 0;
        /* cut off where it is too long to be anybody's */
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", start, name);
    }
    errno = before;
    return path;
}

static int fd_fails(const char *name, int fd, size_t *bytes) {
    char path[PATH_MAX];
    return folder[0] && fails(name, of_fd(fd, path), bytes);
}

static int name_fails(const char *name, int at, const char *file) {
    char path[PATH_MAX];
    return folder[0] && fails(name, of_name(at, file, path), NULL);
}

/* Opening a file that is there takes no room; making one does. */
static int open_fails(int at, const char *file, int flags) {
    char path[PATH_MAX];
    if (!folder[0] || !(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return 0;
    of_name(at, file, path);
    int before = errno, there = access(path, F_OK) == 0;
    errno = before;
    return fails(there || !(flags & O_CREAT) ? "open" : "create", path, NULL);
}

#define NEXT(result, name, ...)                                          \
    static result (*next)(__VA_ARGS__);                                  \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, name)

#define MODE(flags, mode)                                                \
    mode_t mode = 0;                                                     \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                               \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode = (mode_t)va_arg(rest, int);                                \
        va_end(rest);                                                    \
    }

#define OPEN(name)                                                       \
    int name(const char *file, int flags, ...) {                         \
        NEXT(int, #name, const char *, int, ...);                        \
        MODE(flags, mode)                                                \
        return open_fails(AT_FDCWD, file, flags) ? -1 : next(file, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
    int name(int at, const char *file, int flags, ...) {                 \
        NEXT(int, #name, int, const char *, int, ...);                   \
        MODE(flags, mode)                                                \
        return open_fails(at, file, flags) ? -1 : next(at, file, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                      \
    int name(const char *file, mode_t mode) {                            \
        NEXT(int, #name, const char *, mode_t);                          \
        return open_fails(AT_FDCWD, file, O_WRONLY | O_CREAT) ? -1 : next(file, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                                      \
    FILE *name(const char *file, const char *mode) {                     \
        NEXT(FILE *, #name, const char *, const char *);                 \
        int flags = strpbrk(mode, "wa") ? O_WRONLY | O_CREAT : strchr(mode, '+') ? O_RDWR : O_RDONLY; \
        return open_fails(AT_FDCWD, file, flags) ? NULL : next(file, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(ssize_t, "write", int, const void *, size_t);
    return fd_fails("write", fd, &size) ? -1 : next(fd, data, size);
}

#define PWRITE(name)                                                     \
    ssize_t name(int fd, const void *data, size_t size, off64_t place) { \
        NEXT(ssize_t, #name, int, const void *, size_t, off64_t);        \
        return fd_fails("write", fd, &size) ? -1 : next(fd, data, size, place); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(ssize_t, "writev", int, const struct iovec *, int);
    size_t size = 0, whole;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    whole = size;
    if (fd_fails("write", fd, &size)) return -1;
    if (size < whole) count = 1; /* the first part alone: short, which is all that is asked for */
    return next(fd, parts, count);
}

#define SENDFILE(name)                                                   \
    ssize_t name(int to, int from, off64_t *place, size_t size) {        \
        NEXT(ssize_t, #name, int, int, off64_t *, size_t);               \
        return fd_fails("write", to, NULL) ? -1 : next(to, from, place, size); \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *place, size_t size, unsigned flags) {
    NEXT(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    return fd_fails("write", to, NULL) ? -1 : next(from, at, to, place, size, flags);
}

int rename(const char *old, const char *new) {
    NEXT(int, "rename", const char *, const char *);
    return name_fails("rename", AT_FDCWD, new) ? -1 : next(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
    NEXT(int, "renameat", int, const char *, int, const char *);
    return name_fails("rename", to, new) ? -1 : next(from, old, to, new);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    NEXT(int, "renameat2", int, const char *, int, const char *, unsigned);
    return name_fails("rename", to, new) ? -1 : next(from, old, to, new, flags);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(int, "mkdir", const char *, mode_t);
    return access(path, F_OK) && name_fails("mkdir", AT_FDCWD, path) ? -1 : next(path, mode);
}

int mkdirat(int at, const char *path, mode_t mode) {
    NEXT(int, "mkdirat", int, const char *, mode_t);
    return name_fails("mkdir", at, path) ? -1 : next(at, path, mode);
}

int link(const char *old, const char *new) {
    NEXT(int, "link", const char *, const char *);
    return name_fails("link", AT_FDCWD, new) ? -1 : next(old, new);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    NEXT(int, "linkat", int, const char *, int, const char *, int);
    return name_fails("link", to, new) ? -1 : next(from, old, to, new, flags);
}

int symlink(const char *old, const char *new) {
    NEXT(int, "symlink", const char *, const char *);
    return name_fails("link", AT_FDCWD, new) ? -1 : next(old, new);
}

int unlink(const char *path) {
    NEXT(int, "unlink", const char *);
    return !access(path, F_OK) && name_fails("unlink", AT_FDCWD, path) ? -1 : next(path);
}

int unlinkat(int at, const char *path, int flags) {
    NEXT(int, "unlinkat", int, const char *, int);
    return name_fails("unlink", at, path) ? -1 : next(at, path, flags);
}

int rmdir(const char *path) {
    NEXT(int, "rmdir", const char *);
    return name_fails("unlink", AT_FDCWD, path) ? -1 : next(path);
}

#define TRUNCATE(name)                                                   \
    int name(int fd, off64_t size) {                                     \
        NEXT(int, #name, int, off64_t);                                  \
        return fd_fails("truncate", fd, NULL) ? -1 : next(fd, size);     \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ALLOCATE(name)                                                   \
    int name(int fd, off64_t place, off64_t size) {                      \
        NEXT(int, #name, int, off64_t, off64_t);                         \
        return fd_fails("allocate", fd, NULL) ? errno : next(fd, place, size); \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define FALLOCATE(name)                                                  \
    int name(int fd, int mode, off64_t place, off64_t size) {            \
        NEXT(int, #name, int, int, off64_t, off64_t);                    \
        return fd_fails("allocate", fd, NULL) ? -1 : next(fd, mode, place, size); \
    }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)

/* Below the folder nothing is really flushed: nobody cuts the power, and it takes most of a tiny run's time. */
#define FSYNC(name)                                                      \
    int name(int fd) {                                                   \
        NEXT(int, #name, int);                                           \
        long before = number;                                            \
        if (fd_fails("fsync", fd, NULL)) return -1;                      \
        return number != before ? 0 : next(fd);                          \
    }
FSYNC(fsync)
FSYNC(fdatasync)

/* A file that is written through memory would tell of a full disk by SIGBUS: noted, and looked for by the tests. */
#define MMAP(name)                                                       \
    void *name(void *start, size_t size, int rights, int flags, int fd, off64_t place) { \
        NEXT(void *, #name, void *, size_t, int, int, int, off64_t);     \
        if (fd >= 0 && (rights & PROT_WRITE) && (flags & MAP_SHARED)) fd_fails("mmap", fd, NULL); \
        return next(start, size, rights, flags, fd, place);              \
    }
MMAP(mmap)
MMAP(mmap64)
