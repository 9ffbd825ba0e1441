/*
 * A boot ROM that proves itself, for hosts whose KVM has no hardware support: the ROM needs neither
 * an operating system nor the FPU, and uses so few instructions that KVM can emulate them all.
 *
 * The ROM fills memory, and rewrites some pages by generation, checking each page before; at the
 * start it sets the local APIC, a debug register and an MSR, and later checks that these are
 * unchanged; its time is kvmclock's.  Each beat is a line on COM1:
 *
 *     beat 12 bad 0 clock 1a2b tsc 9c0ffee
 *
 * clock: kvmclock, in units of 2^20 ns; clock and tsc are in hex.  Each fault is named in a line of
 * its own, and counts as bad.  No interrupt is ever taken.
 *
 * 32 bits, no paging.  Low memory: the kvmclock structure at 0x9000, generations from 0x100000,
 * the stack below 0x80000, the pages from 16 MiB.
 * Source: Intel SDM vol. 3, ch. 9.1 (reset) and 11 (APIC); Linux, virt/kvm/x86/msr.rst.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Few pages, because a page takes milliseconds if each instruction is emulated. */
enum { PAGES = 128, HOT = 32, PAGES_A_BEAT = 1, WORDS = 1024, BEAT_SHIFTED_NS = 48 };

#define GENERATION ((volatile u32 *)0x100000)
#define PAGE(n) ((volatile u32 *)(0x1000000 + (n) * 4096))
#define APIC(offset) (*(volatile u32 *)(0xfee00000 + (offset)))
#define CANARY 0x5eed1234

__asm__(
    ".section .start, \"ax\"\n"
    ".code16\n"
    "start: cli\n cld\n"
    " lgdtl %cs:table - start\n"
    " movl %cr0, %eax\n orl $1, %eax\n movl %eax, %cr0\n"
    " ljmpl $8, $flat\n"
    ".balign 8\n"
    "gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
    "table: .word 23\n .long gdt\n"
    ".code32\n"
    "flat: movw $16, %ax\n movw %ax, %ds\n movw %ax, %es\n movw %ax, %ss\n"
    " movl $0x80000, %esp\n"
    " call main\n"
    "0: hlt\n jmp 0b\n"
    ".section .reset, \"ax\"\n"
    ".code16\n"
    " .byte 0xe9, 0x0d, 0x00\n" /* jmp start: it is 64 KiB below the end, where IP wraps to 0 */
    " .balign 16\n"
    ".code32\n"
    ".text\n");

static inline void outb(unsigned short port, u8 value) {
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline u8 inb(unsigned short port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 rdtsc(void) {
    u64 value;
    __asm__ volatile("rdtsc" : "=A"(value));
    return value;
}

static inline u64 rdmsr(u32 number) {
    u64 value;
    __asm__ volatile("rdmsr" : "=A"(value) : "c"(number));
    return value;
}

static inline void wrmsr(u32 number, u64 value) {
    __asm__ volatile("wrmsr" ::"c"(number), "A"(value));
}

static void put(char c) {
    while (!(inb(0x3fd) & 0x20))
        ;
    outb(0x3f8, c);
}

static void say(const char *text) {
    while (*text)
        put(*text++);
}

static void say_number(u32 n) {
    char digits[11];
    int at = 10;
    digits[10] = 0;
    do
        digits[--at] = '0' + n % 10;
    while (n /= 10);
    say(digits + at);
}

static void say_hex(u64 n) {
    int shift = 60;
    while (shift && !(n >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[(u32)(n >> shift) & 15]);
}

static u32 word_of(u32 page, u32 generation) {
    u32 x = page * 0x9e3779b1 ^ generation * 0x85ebca6b;
    return x ^ x >> 15;
}

static void fill(u32 page, u32 generation) {
    volatile u32 *words = PAGE(page);
    u32 word = word_of(page, generation);
    for (int i = 0; i < WORDS; i++)
        words[i] = word + i;
    GENERATION[page] = generation;
}

static u32 is_wrong(u32 page) {
    volatile u32 *words = PAGE(page);
    u32 word = word_of(page, GENERATION[page]);
    for (int i = 0; i < WORDS; i++)
        if (words[i] != word + i) {
            say("page ");
            say_number(page);
            say(" is wrong\n");
            return 1;
        }
    return 0;
}

/* The registers of the processor and its APIC: set once, and unchanged afterwards. */

static const struct {
    u32 offset, value;
} SET[] = {
    {0x0f0, 0x1ff},      /* spurious vector: the APIC is on */
    {0x080, 0x20},       /* task priority */
    {0x0d0, 0x05000000}, /* logical destination */
    {0x320, 0x30031},    /* timer: periodic, masked */
    {0x3e0, 0x0b},       /* timer: divide by 1 */
    {0x380, 0x7ffffff1}, /* timer: initial count */
};
enum { NSET = sizeof SET / sizeof *SET, COUNT = 0x390, SYSENTER_ESP = 0x175 };

static void set_registers(void) {
    for (int i = 0; i < NSET; i++)
        APIC(SET[i].offset) = SET[i].value;
    __asm__ volatile("movl %0, %%dr0" ::"r"(CANARY));
    wrmsr(SYSENTER_ESP, CANARY);
}

static u32 wrong_registers(void) {
    static const char *const NAMES[] = {"spurious", "priority", "destination", "timer", "divide",
                                        "initial"};
    u32 bad = 0, debug;
    for (int i = 0; i < NSET; i++)
        if (APIC(SET[i].offset) != SET[i].value) {
            say("apic ");
            say(NAMES[i]);
            say(" is wrong\n");
            bad++;
        }
    __asm__ volatile("movl %%dr0, %0" : "=r"(debug));
    if (debug != CANARY || rdmsr(SYSENTER_ESP) != CANARY) {
        say("dr0 or sysenter_esp is wrong\n");
        bad++;
    }
    return bad;
}

/* kvmclock, which the host keeps up to date in the guest's memory. */

struct pvclock {
    u32 version, pad;
    u64 tsc, system_ns;
    u32 multiplier;
    signed char shift;
    u8 flags, pad2[2];
};
#define CLOCK ((volatile struct pvclock *)0x9000)
enum { SYSTEM_TIME_NEW = 0x4b564d01 };

static int has_kvmclock(void) {
    u32 a = 0x40000001, b, c, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    return a >> 3 & 1;
}

static u64 clock_ns(void) {
    u32 version;
    u64 ns;
    do {
        version = CLOCK->version;
        u64 ticks = rdtsc() - CLOCK->tsc;
        ticks = CLOCK->shift < 0 ? ticks >> -CLOCK->shift : ticks << CLOCK->shift;
        ns = ((u64)(u32)ticks * CLOCK->multiplier >> 32) + (ticks >> 32) * CLOCK->multiplier;
        ns += CLOCK->system_ns;
    } while (version & 1 || version != CLOCK->version);
    return ns;
}

void main(void) {
    outb(0x3f9, 0); /* no interrupts */
    outb(0x3fb, 3); /* 8 bits */
    if (!has_kvmclock()) {
        say("no kvmclock\n");
        return;
    }
    for (u32 page = 0; page < PAGES; page++)
        fill(page, 1);
    wrmsr(SYSTEM_TIME_NEW, (u32)CLOCK | 1);
    set_registers();

    u32 beat = 0, bad = 0, hot = 0, next = 0, count = 0;
    u64 last = 0;
    for (;;) {
        for (int i = 0; i < PAGES_A_BEAT; i++) {
            bad += is_wrong(hot);
            fill(hot, GENERATION[hot] + 1);
            hot = (hot + 1) % HOT;
            bad += is_wrong(next);
            next = (next + 1) % PAGES;
        }
        bad += wrong_registers();
        u64 now = clock_ns() >> 20;
        while (now < last + BEAT_SHIFTED_NS && now >= last)
            now = clock_ns() >> 20;
        if (now < last) {
            say("the clock goes back\n");
            bad++;
        }
        last = now;
        if (APIC(COUNT) == count) {
            say("the apic's timer stands\n");
            bad++;
        }
        count = APIC(COUNT);
        say("beat ");
        say_number(beat++);
        say(" bad ");
        say_number(bad);
        say(" clock ");
        say_hex(now);
        say(" tsc ");
        say_hex(rdtsc());
        say("\n");
    }
}
