/* A stand-in for libcuda.so.1 within one process: one GPU whose memory kills whoever touches it with the processor.
   Device memory is a range without access rights; the driver's copies go through a second mapping of the same file. */
#define _GNU_SOURCE
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, MOST = 64 };

static struct { char *device, *shadow; size_t nbytes; } taken[MOST];

static char *shadow_of(unsigned long long device) {
    char *address = (char *)device;
    for (int i = 0; i < MOST; i++)
        if (taken[i].device && address >= taken[i].device && address < taken[i].device + taken[i].nbytes)
            return taken[i].shadow + (address - taken[i].device);
    return NULL;
}

int cuMemAlloc_v2(unsigned long long *device, size_t nbytes) {
    for (int i = 0; i < MOST; i++) {
        if (taken[i].device) continue;
        int file = memfd_create("device", 0);
        if (file < 0 || ftruncate(file, nbytes)) return OUT_OF_MEMORY;
        taken[i].shadow = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        taken[i].device = mmap(NULL, nbytes, PROT_NONE, MAP_SHARED, file, 0);
        taken[i].nbytes = nbytes;
        close(file);
        *device = (unsigned long long)taken[i].device;
        return OK;
    }
    return OUT_OF_MEMORY;
}

int cuMemFree_v2(unsigned long long device) {
    for (int i = 0; i < MOST; i++)
        if (taken[i].device == (char *)device && device) {
            munmap(taken[i].device, taken[i].nbytes);
            munmap(taken[i].shadow, taken[i].nbytes);
            taken[i].device = NULL;
            return OK;
        }
    return INVALID;
}

int cuMemcpyHtoD_v2(unsigned long long target, const void *source, size_t nbytes) {
    char *shadow = shadow_of(target);
    return shadow ? (memcpy(shadow, source, nbytes), OK) : INVALID;
}

int cuMemcpyDtoH_v2(void *target, unsigned long long source, size_t nbytes) {
    char *shadow = shadow_of(source);
    return shadow ? (memcpy(target, shadow, nbytes), OK) : INVALID;
}

int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuDeviceGetCount(int *count) { return *count = 1, OK; }
int cuDeviceGet(int *device, int index) { return *device = index, index ? INVALID_DEVICE : OK; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { return memset(uuid, 0xAB, 16), device; }
int cuDeviceGetName(char *name, int nbytes, int device) { return strncpy(name, "stand-in", nbytes), device; }
int cuDeviceTotalMem_v2(size_t *nbytes, int device) { return *nbytes = (size_t)1 << 30, device; }

/* Whoever makes a context is heard: nobody who only asks may make one. */
int cuDevicePrimaryCtxRetain(void **context, int device) {
    return write(2, "context\n", 8) == 8 ? (*context = (void *)taken, device) : INVALID;
}
int cuCtxPushCurrent_v2(void *context) { return context ? OK : INVALID; }
int cuCtxSynchronize(void) { return OK; }
