/* A switch between network namespaces, with a rate and a delay: the stand-in for the kernel's netem, which few kernels
   that tests run on have. switch PID...: port i is a tap device "eth0" in the network namespace of the i-th process;
   its MAC address ends in i. Says "up", then obeys lines on its input, answering each: "rate MBIT", "rate off",
   "delay MICROSECONDS", "cut PORT", "heal PORT". Ends with its input.

   Frames come and go in the units of up to 64 KiB that TCP segmentation offload makes, with their headers for it. Each
   port serializes what it takes in and what it gives out, at the rate; a sender is held back, and nothing is lost. A
   frame takes its turn in what the receiver is given when it begins to leave the sender, not when it is handed over:
   else an acknowledgement behind data for another host would keep the receiver's link reserved, and idle, until then. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { PORTS = 32, FRAME = 66000, OFFLOAD_HEADER = 10, LEAST_FRAME = OFFLOAD_HEADER + 14, QUEUE = 1 << 20 };

struct frame {
    struct frame *next;
    int64_t due; /* when it begins to leave its sender, then when it reaches its receiver */
    int from, to, nbytes;
    char bytes[];
};

struct queue {
    struct frame *first, *last;
};

static struct port {
    int fd, is_cut;
    int64_t sends_until, receives_until; /* when the frames taken so far have passed its two directions */
    long queued;                         /* bytes from it that have not been delivered */
    struct queue leaving, coming;        /* from it, to be delivered to it; in order of time */
} ports[PORTS + 1];
static int count;
static double bits_per_ns;
static int64_t delay_ns;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void fail(const char *what) {
    printf("%s: %m\n", what);
    exit(1);
}

/* A device in the namespaces of a process; the queue belongs to the descriptor, wherever that is. */
static int open_tap(const char *pid) {
    char path[64];
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int own = open("/proc/self/ns/net", O_RDONLY), theirs, fd;
    snprintf(path, sizeof path, "/proc/%s/ns/net", pid);
    theirs = open(path, O_RDONLY);
    if (own < 0 || theirs < 0 || setns(theirs, CLONE_NEWNET)) fail(path);
    strcpy(request.ifr_name, "eth0");
    fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request)) fail("/dev/net/tun");
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)) fail("segmentation offload");
    if (setns(own, CLONE_NEWNET)) fail("back to the own namespace");
    close(own);
    close(theirs);
    return fd;
}

static void append(struct queue *queue, struct frame *frame) {
    frame->next = NULL;
    if (queue->last) queue->last->next = frame;
    else queue->first = frame;
    queue->last = frame;
}

static struct frame *pop(struct queue *queue) {
    struct frame *frame = queue->first;
    queue->first = frame->next;
    if (!queue->first) queue->last = NULL;
    return frame;
}

static int64_t passing_ns(int nbytes) { return bits_per_ns > 0 ? (int64_t)(nbytes * 8 / bits_per_ns) : 0; }

static void take(int from, int to, const char *bytes, int nbytes) {
    struct port *source = ports + from;
    struct frame *frame;
    int64_t start = now();
    if (source->is_cut || ports[to].is_cut) return;
    if (source->sends_until > start) start = source->sends_until;
    source->sends_until = start + passing_ns(nbytes);
    frame = malloc(sizeof *frame + nbytes);
    if (!frame) fail("memory");
    *frame = (struct frame){.due = start, .from = from, .to = to, .nbytes = nbytes};
    memcpy(frame->bytes, bytes, nbytes);
    append(&source->leaving, frame);
    source->queued += nbytes;
}

/* What begins to leave takes its turn at the receiver, whoever began first. Returns when the next one will. */
static int64_t pass_on(void) {
    for (;;) {
        struct port *source = NULL, *target;
        struct frame *frame;
        int64_t start;
        for (int from = 1; from <= count; from++)
            if (ports[from].leaving.first && (!source || ports[from].leaving.first->due < source->leaving.first->due))
                source = ports + from;
        if (!source) return INT64_MAX;
        start = source->leaving.first->due;
        if (start > now()) return start;
        frame = pop(&source->leaving);
        target = ports + frame->to;
        if (target->receives_until > start) start = target->receives_until;
        target->receives_until = start + passing_ns(frame->nbytes);
        frame->due = target->receives_until + delay_ns;
        append(&target->coming, frame);
    }
}

/* Deliver what is due; returns when there will be something to do again. */
static int64_t deliver(void) {
    int64_t next = now() + INT64_C(1000000000), leaves = pass_on();
    if (leaves < next) next = leaves;
    for (int to = 1; to <= count; to++) {
        struct port *target = ports + to;
        struct frame *frame;
        while ((frame = target->coming.first) && frame->due <= now()) {
            if (!target->is_cut && write(target->fd, frame->bytes, frame->nbytes) < 0) perror("a frame was lost");
            ports[frame->from].queued -= frame->nbytes;
            free(pop(&target->coming));
        }
        if (frame && frame->due < next) next = frame->due;
    }
    return next;
}

static void read_frame(int from) {
    static char bytes[FRAME];
    int nbytes = read(ports[from].fd, bytes, sizeof bytes);
    unsigned char *to = (unsigned char *)bytes + OFFLOAD_HEADER;
    if (nbytes < LEAST_FRAME) return;
    if (to[0] & 1) {
        for (int port = 1; port <= count; port++)
            if (port != from) take(from, port, bytes, nbytes);
    } else if (to[5] >= 1 && to[5] <= count) {
        take(from, to[5], bytes, nbytes);
    }
}

static void obey(void) {
    static char line[256];
    char word[16];
    double value = 0;
    if (!fgets(line, sizeof line, stdin)) exit(0);
    if (sscanf(line, "%15s %lf", word, &value) < 1) return;
    if (!strcmp(word, "rate")) bits_per_ns = value / 1000;
    if (!strcmp(word, "delay")) delay_ns = (int64_t)(value * 1000);
    if (!strcmp(word, "cut") || !strcmp(word, "heal")) ports[(int)value].is_cut = word[0] == 'c';
    puts("ok");
}

int main(int argc, char **argv) {
    struct sched_param first = {.sched_priority = 1};
    struct pollfd polled[PORTS + 1];
    count = argc - 1;
    if (count < 1 || count > PORTS) fail("1 to 32 process ids");
    setvbuf(stdout, NULL, _IOLBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0);
    prctl(PR_SET_TIMERSLACK, 1);
    sched_setscheduler(0, SCHED_FIFO, &first); /* a refusal costs accuracy only */
    for (int port = 1; port <= count; port++) ports[port].fd = open_tap(argv[port]);
    puts("up");
    for (;;) {
        int64_t wait = deliver() - now();
        struct timespec timeout = {.tv_nsec = wait > 0 ? wait % INT64_C(1000000000) : 0};
        if (wait >= INT64_C(1000000000)) timeout.tv_sec = 1;
        polled[0] = (struct pollfd){.fd = 0, .events = POLLIN};
        for (int port = 1; port <= count; port++)
            polled[port] = (struct pollfd){.fd = ports[port].queued < QUEUE ? ports[port].fd : -1, .events = POLLIN};
        if (ppoll(polled, count + 1, &timeout, NULL) <= 0) continue;
        for (int port = 1; port <= count; port++)
            if (polled[port].fd >= 0 && polled[port].revents & POLLIN) read_frame(port);
        if (polled[0].revents) obey();
    }
}
