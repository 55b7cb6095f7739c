/* A stand-in for CUDA's driver, libcuda.so.1 (and for libnvidia-ml.so.1, which UCX asks for, too), on a machine without a
 * GPU. Its device memory is a range of addresses that may not be touched: a CPU that reads or writes it dies by SIGSEGV.
 * The content lies in a file in memory that is mapped a second time, and only the driver's copies get at it. Another
 * process opens the file by /proc, as CUDA IPC does with a handle; the process itself cannot, as there.
 *
 * Everything runs at once, so streams and events are always done. What is missing says "not supported". Types are those
 * of cuda.h, which is not needed. `standin_counts` counts copies to, from and within the device, and opened handles. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int result;
typedef uint64_t address;
enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { MOST = 4096, PAGE = 4096 };

struct handle { char reserved[64]; };
struct ticket { int pid, fd; uint64_t nbytes; };
struct block { char *device, *content; uint64_t nbytes; int fd, is_foreign; };

static struct block blocks[MOST];
static int count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
unsigned long standin_counts[4];

static struct block *block_of(address at) {
    for (int i = count - 1; i >= 0; i--)
        if (blocks[i].device && (char *)at >= blocks[i].device && (char *)at < blocks[i].device + blocks[i].nbytes)
            return &blocks[i];
    return NULL;
}

static result add(int fd, uint64_t nbytes, int is_foreign, address *out) {
    void *content = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    void *device = mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (content == MAP_FAILED || device == MAP_FAILED) return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    int full = count == MOST;
    if (!full) blocks[count++] = (struct block){device, content, nbytes, fd, is_foreign};
    pthread_mutex_unlock(&lock);
    *out = (address)device;
    return full ? OUT_OF_MEMORY : SUCCESS;
}

result cuMemAlloc_v2(address *out, size_t nbytes) {
    nbytes = (nbytes + PAGE - 1) / PAGE * PAGE;
    int fd = memfd_create("device", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, nbytes)) return OUT_OF_MEMORY;
    return add(fd, nbytes, 0, out);
}

result cuMemFree_v2(address at) {
    struct block *block = block_of(at);
    if (!block) return INVALID_VALUE;
    munmap(block->device, block->nbytes);
    munmap(block->content, block->nbytes);
    close(block->fd);
    block->device = NULL;
    return SUCCESS;
}

/* -- another process's memory -- */

result cuIpcGetMemHandle(struct handle *out, address at) {
    struct block *block = block_of(at);
    if (!block || block->is_foreign) return INVALID_VALUE;
    struct ticket ticket = {getpid(), block->fd, block->nbytes};
    memset(out, 0, sizeof *out);
    memcpy(out, &ticket, sizeof ticket);
    return SUCCESS;
}

result cuIpcOpenMemHandle_v2(address *out, struct handle handle, unsigned flags) {
    struct ticket ticket;
    char path[64];
    memcpy(&ticket, &handle, sizeof ticket);
    if (ticket.pid == getpid()) return INVALID_CONTEXT;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", ticket.pid, ticket.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return INVALID_VALUE;
    standin_counts[3]++;
    return add(fd, ticket.nbytes, 1, out);
}

result cuIpcCloseMemHandle(address at) { return cuMemFree_v2(at); }

/* -- copies -- */

static result copy(address to, address from, size_t nbytes) {
    struct block *target = block_of(to), *source = block_of(from);
    char *into = target ? target->content + ((char *)to - target->device) : (char *)to;
    const char *out_of = source ? source->content + ((char *)from - source->device) : (char *)from;
    memmove(into, out_of, nbytes);
    if (target || source) __atomic_fetch_add(&standin_counts[!target ? 1 : !source ? 0 : 2], 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

result cuMemcpyHtoD_v2(address to, const void *from, size_t nbytes) { return copy(to, (address)from, nbytes); }
result cuMemcpyDtoH_v2(void *to, address from, size_t nbytes) { return copy((address)to, from, nbytes); }
result cuMemcpyDtoD_v2(address to, address from, size_t nbytes) { return copy(to, from, nbytes); }
result cuMemcpyAsync(address to, address from, size_t nbytes, void *stream) { return copy(to, from, nbytes); }
result cuMemcpyDtoDAsync_v2(address to, address from, size_t nbytes, void *stream) { return copy(to, from, nbytes); }

/* -- what a pointer points to -- */

result cuMemGetAddressRange_v2(address *begin, size_t *nbytes, address at) {
    struct block *block = block_of(at);
    if (!block) return NOT_FOUND;
    if (begin) *begin = (address)block->device;
    if (nbytes) *nbytes = block->nbytes;
    return SUCCESS;
}

static char context[8];

static result attribute(void *out, int which, address at, int is_lenient) {
    struct block *block = block_of(at);
    if (!block && !is_lenient) return INVALID_VALUE;
    switch (which) {
    case 1: *(void **)out = block ? context : NULL; return SUCCESS;             /* context */
    case 2: *(unsigned *)out = block ? 2 : 0; return SUCCESS;                   /* memory type: device */
    case 7: *(uint64_t *)out = block ? block - blocks + 1 : 0; return SUCCESS;  /* buffer id */
    case 8: *(unsigned *)out = 0; return SUCCESS;                               /* managed */
    case 9: *(int *)out = block ? 0 : -2; return SUCCESS;                       /* device */
    case 10: *(int *)out = block != NULL; return SUCCESS;                       /* exportable by a handle */
    case 14: *(uint64_t *)out = 0; return SUCCESS;                              /* other kinds of handles */
    case 17: *(void **)out = NULL; return SUCCESS;                              /* memory pool */
    default: return NOT_SUPPORTED;
    }
}

result cuPointerGetAttribute(void *out, int which, address at) { return attribute(out, which, at, 0); }
result cuPointerGetAttributes(unsigned n, int *which, void **out, address at) {
    for (unsigned i = 0; i < n; i++) {
        result code = attribute(out[i], which[i], at, 1);
        if (code) return code;
    }
    return SUCCESS;
}
result cuPointerSetAttribute(const void *value, int which, address at) { return SUCCESS; }

/* -- one device, one context -- */

result cuInit(unsigned flags) { return SUCCESS; }
result cuDeviceGetCount(int *n) { *n = 1; return SUCCESS; }
result cuDeviceGet(int *device, int ordinal) { *device = 0; return ordinal ? INVALID_VALUE : SUCCESS; }
result cuDeviceGetName(char *name, int room, int device) { snprintf(name, room, "no GPU at all"); return SUCCESS; }
result cuDeviceGetUuid_v2(char uuid[16], int device) { memset(uuid, 1, 16); return SUCCESS; }
result cuDeviceTotalMem_v2(size_t *nbytes, int device) { *nbytes = (size_t)64 << 30; return SUCCESS; }
result cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 9 : which == 41 || which == 33; /* capability 9.0, unified addresses, bus 1 */
    return SUCCESS;
}
result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 1;
    return SUCCESS;
}
result cuDevicePrimaryCtxRetain(void **out, int device) { *out = context; return SUCCESS; }
result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
result cuCtxGetCurrent(void **out) { *out = context; return SUCCESS; }
result cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
result cuCtxGetId(void *which, unsigned long long *id) { *id = 1; return SUCCESS; }
result cuCtxSynchronize(void) { return SUCCESS; }
result cuCtxPushCurrent_v2(void *which) { return SUCCESS; }
result cuCtxPopCurrent_v2(void **out) { if (out) *out = context; return SUCCESS; }
result cuGetErrorString(result code, const char **text) {
    *text = code == INVALID_CONTEXT ? "a handle cannot be opened in the process that made it" : "the stand-in says no";
    return SUCCESS;
}

/* -- streams and events: everything is done at once -- */

result cuStreamCreate(void **out, unsigned flags) { *out = context; return SUCCESS; }
result cuStreamDestroy_v2(void *stream) { return SUCCESS; }
result cuStreamSynchronize(void *stream) { return SUCCESS; }
result cuStreamAddCallback(void *stream, void (*call)(void *, result, void *), void *data, unsigned flags) {
    call(stream, SUCCESS, data);
    return SUCCESS;
}
result cuEventCreate(void **out, unsigned flags) { *out = context; return SUCCESS; }
result cuEventDestroy_v2(void *event) { return SUCCESS; }
result cuEventQuery(void *event) { return SUCCESS; }
result cuEventRecord(void *event, void *stream) { return SUCCESS; }
result cuMemHostRegister_v2(void *at, size_t nbytes, unsigned flags) { return SUCCESS; }
result cuMemHostUnregister(void *at) { return SUCCESS; }

/* -- what it does not have -- */

result cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
    if (out) *out = NULL;
    if (status) *status = 1;
    return NOT_FOUND;
}
const char *nvmlErrorString(int code) { return "no such library here"; }
int nvmlInit_v2(void) { return 12; }

#define MISSING(name) result name(void) { return NOT_SUPPORTED; }
MISSING(cuMemAddressFree) MISSING(cuMemAddressReserve) MISSING(cuMemAllocManaged) MISSING(cuMemCreate)
MISSING(cuMemExportToShareableHandle) MISSING(cuMemGetAllocationGranularity) MISSING(cuMemMap) MISSING(cuMemUnmap)
MISSING(cuMemGetAllocationPropertiesFromHandle) MISSING(cuMemImportFromShareableHandle) MISSING(cuMemPoolDestroy)
MISSING(cuMemPoolExportPointer) MISSING(cuMemPoolExportToShareableHandle) MISSING(cuMemPoolImportFromShareableHandle)
MISSING(cuMemPoolImportPointer) MISSING(cuMemPoolSetAccess) MISSING(cuMemRangeGetAttribute) MISSING(cuMemRelease)
MISSING(cuMemRetainAllocationHandle) MISSING(cuMemSetAccess)
