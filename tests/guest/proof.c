/*
 * proof: /init of a guest that proves its own memory (and disk) right.
 *
 * The guest owns an area of pages.  Page index and generation determine every
 * byte of a page; a table in guest memory holds the expected generation of each
 * page.  Some pages are rewritten all the time with the next generation, some
 * are zeroed and filled again, the rest stay as they are.  All pages are
 * compared with the table again and again, and once more right before they are
 * overwritten, so that a rewrite cannot hide damage by luck.  If a migration
 * loses a page, brings an older page, mixes two, or forgets that a page became
 * zero, the guest itself reports that on the serial line.
 *
 * Exactly one thread both rewrites and verifies a page; so there is no lock,
 * and no window in which a half-written page is judged.  The table is proven
 * as well: each thread counts its writes outside the table, and the sum of the
 * thread's generations in the table must equal that count.  Without that, an
 * old table page together with its old data pages would pass.
 *
 * A page in memory, little endian (ram.py at the host finds pages by this):
 *
 *      0  8  magic "BHYPROOF"
 *      8  4  page index
 *     12  4  generation
 *     16     510 words of 8 bytes seeded by (index, generation)
 *
 * or 4096 zero bytes while the page is a hole.
 *
 * Serial output, one line per write(2):
 *
 *     hb SEQ sweeps=N bad=N gen=N [disk=N]    each 100 ms, SEQ without gaps
 *     ready                                   the area is filled
 *     BAD page=I want=GEN|zero got=GEN|zero|garbage [torn at=BYTE]
 *     BAD table thread=T want=WRITES got=SUM
 *     BAD block=B want=GEN got=GEN|garbage
 *     FAIL reason                             setup failed; the guest stops
 *
 * sweeps counts complete passes over the whole area (the slowest thread's),
 * gen the pages written since the start, disk the blocks written and read.
 *
 * Kernel command line (defaults in parentheses): proof.mib=(160) area;
 * proof.work=(48) MiB of it that are rewritten; proof.holes=(8) MiB that are
 * zeroed and filled in turn; proof.rate=(32) MiB/s rewritten; proof.sweep=
 * (500) milliseconds that one sweep is spread over, 0 for as fast as it goes;
 * proof.threads=(number of CPUs); proof.disk=(0) 1 to use /dev/vda;
 * proof.seed=(1) of the order in which pages are chosen.
 */
#define _GNU_SOURCE
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 8)
#define MIB_PAGES 256u
#define CHUNK_PAGES 64u		/* the unit of ownership and of holes: 256 KiB */
#define BATCH_PAGES 32u		/* work between two looks at the clock */
#define HEADER_WORDS 2u
#define MAX_THREADS 16u
#define MAX_BAD_LINES 64u
#define HEARTBEAT_NS 100000000ull
#define NAP_NS 4000000ull
#define DISK_NAP_NS 10000000ull
#define DISK_MAX_BLOCKS 2048u
#define SECOND_NS 1000000000ull

static const uint64_t MAGIC = 0x464f4f5250594842ull;	/* "BHYPROOF" */

/* A table entry: generation << 1, and bit 0 set while the page is a hole. */
#define HOLE 1u

struct worker {
	_Alignas(64) uint32_t id;
	uint32_t nwork, nholes, npages;	/* this thread's pages, by kind and in all */
	uint64_t rng;
	uint64_t writes;		/* the sum of the generations of its pages */
	_Atomic uint64_t published_writes;
	_Atomic uint64_t sweeps;
};

static struct {
	uint64_t mib, work, holes, rate, sweep, threads, disk, seed;
} option = { 160, 48, 8, 32, 500, 0, 0, 1 };

static int tty = -1;
static uint64_t *area;
static uint32_t *table;
static struct worker workers[MAX_THREADS];
static pthread_barrier_t filled;
static _Atomic uint64_t bad, disk_operations;

static void
say(const char *format, ...)
{
	char line[256];
	va_list ap;

	va_start(ap, format);
	int n = vsnprintf(line, sizeof(line) - 1, format, ap);
	va_end(ap);
	if (n < 0)
		return;
	if ((size_t)n > sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	for (int done = 0; done < n;) {
		ssize_t wrote = write(tty, line + done, (size_t)(n - done));
		if (wrote < 0 && errno != EINTR)
			return;		/* the serial line is broken */
		if (wrote > 0)
			done += (int)wrote;
	}
}

static _Noreturn void
fail(const char *what)
{
	say("FAIL %s: %s", what, strerror(errno));
	tcdrain(tty);
	reboot(RB_AUTOBOOT);		/* with -no-reboot QEMU ends */
	for (;;)
		pause();
}

static uint64_t
now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * SECOND_NS + (uint64_t)ts.tv_nsec;
}

static void
sleep_until(uint64_t when_ns)
{
	struct timespec ts = { (time_t)(when_ns / SECOND_NS), (long)(when_ns % SECOND_NS) };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR)
		;
}

/* splitmix64: neighboring indexes and generations must give unrelated values. */
static uint64_t
mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t
next_random(uint64_t *state)
{
	*state += 0x9e3779b97f4a7c15ull;
	return mix(*state);
}

/*
 * The body of a page: a multiplicative generator, its high half folded down.
 * Two multiplications a word would be better noise, but twice as slow under
 * emulation, and all words only have to be different.
 */
#define STEP(x) ((x) * 6364136223846793005ull + 1442695040888963407ull)
#define FOLD(x) ((x) ^ ((x) >> 32))

static void
page_write(uint64_t *page, uint32_t index, uint32_t generation)
{
	uint64_t tag = (uint64_t)generation << 32 | index, x = mix(tag);

	page[0] = MAGIC;
	page[1] = tag;
	for (unsigned i = HEADER_WORDS; i < PAGE_WORDS; i++) {
		x = STEP(x);
		page[i] = FOLD(x);
	}
}

/* Compare every byte; return the number of words that are right from the start. */
static unsigned
page_check(const uint64_t *page, uint32_t index, uint32_t generation)
{
	uint64_t tag = (uint64_t)generation << 32 | index, x = mix(tag);

	if (page[0] != MAGIC)
		return 0;
	if (page[1] != tag)
		return 1;
	for (unsigned i = HEADER_WORDS; i < PAGE_WORDS; i++) {
		x = STEP(x);
		if (page[i] != FOLD(x))
			return i;
	}
	return PAGE_WORDS;
}

static unsigned
zero_check(const uint64_t *page)
{
	for (unsigned i = 0; i < PAGE_WORDS; i++)
		if (page[i] != 0)
			return i;
	return PAGE_WORDS;
}

/* Count one fault; true while there is still room for a line about it. */
static bool
count_bad(void)
{
	return atomic_fetch_add(&bad, 1) < MAX_BAD_LINES;
}

static void
report_page(uint32_t index, uint32_t entry, const uint64_t *page, unsigned right)
{
	char want[16] = "zero", got[16] = "garbage", torn[32] = "";
	uint32_t generation = (uint32_t)(page[1] >> 32);

	if (!count_bad())
		return;
	if (!(entry & HOLE))
		snprintf(want, sizeof(want), "%u", entry >> 1);
	if (page[0] == MAGIC && (uint32_t)page[1] == index) {
		snprintf(got, sizeof(got), "%u", generation);
		if (generation == entry >> 1)
			snprintf(torn, sizeof(torn), " torn at=%u", right * 8);
		else if ((right = page_check(page, index, generation)) != PAGE_WORDS)
			snprintf(torn, sizeof(torn), " torn at=%u", right * 8);
	} else if (zero_check(page) == PAGE_WORDS)
		strcpy(got, "zero");
	say("BAD page=%u want=%s got=%s%s", index, want, got, torn);
}

static uint64_t *
page_at(uint32_t index)
{
	return area + (size_t)index * PAGE_WORDS;
}

static void
verify(uint32_t index)
{
	uint32_t entry = table[index];
	uint64_t *page = page_at(index);
	unsigned right = (entry & HOLE) ? zero_check(page) : page_check(page, index, entry >> 1);

	if (right != PAGE_WORDS)
		report_page(index, entry, page, right);
}

/* Write the next generation of a page, after checking the present one. */
static void
rewrite(struct worker *w, uint32_t index, bool hole)
{
	uint32_t generation = (table[index] >> 1) + 1;

	verify(index);
	if (hole)
		memset(page_at(index), 0, PAGE_BYTES);
	else
		page_write(page_at(index), index, generation);
	table[index] = generation << 1 | (hole ? HOLE : 0);
	w->writes++;
}

/* Return a thread's n-th page: chunks are dealt to the threads in turn. */
static uint32_t
mine(const struct worker *w, uint32_t n)
{
	return (n / CHUNK_PAGES * (uint32_t)option.threads + w->id) * CHUNK_PAGES + n % CHUNK_PAGES;
}

/* Return how many of the first `end` pages are a thread's (end: a multiple of CHUNK_PAGES). */
static uint32_t
share(const struct worker *w, uint64_t end)
{
	uint64_t chunks = end / CHUNK_PAGES, threads = option.threads;

	return (uint32_t)(chunks > w->id ? (chunks - w->id + threads - 1) / threads : 0) * CHUNK_PAGES;
}

/* Rewrite a random page, or turn a random chunk to zero or back; return the pages written. */
static uint32_t
write_some(struct worker *w)
{
	uint64_t r = next_random(&w->rng);

	/* About one write in 8 goes to holes; a hole is a chunk of writes, so one choice in 512. */
	if (w->nholes != 0 && (w->nwork == 0 || r % (8 * CHUNK_PAGES) == 0)) {
		uint32_t first = w->nwork +
		    (uint32_t)((r >> 32) % (w->nholes / CHUNK_PAGES)) * CHUNK_PAGES;
		bool hole = !(table[mine(w, first)] & HOLE);
		for (uint32_t i = 0; i < CHUNK_PAGES; i++)
			rewrite(w, mine(w, first + i), hole);
		return CHUNK_PAGES;
	}
	if (w->nwork == 0)
		return 1;		/* count a write, although there is no page to write */
	rewrite(w, mine(w, (uint32_t)((r >> 32) % w->nwork)), false);
	return 1;
}

static void
end_sweep(struct worker *w)
{
	uint64_t sum = 0;

	for (uint32_t n = 0; n < w->npages; n++)
		sum += table[mine(w, n)] >> 1;
	if (sum != w->writes && count_bad())
		say("BAD table thread=%u want=%llu got=%llu", w->id,
		    (unsigned long long)w->writes, (unsigned long long)sum);
	atomic_fetch_add(&w->sweeps, 1);
}

static void
fill(struct worker *w)
{
	for (uint32_t n = 0; n < w->npages; n++) {
		uint32_t index = mine(w, n);
		page_write(page_at(index), index, 1);
		table[index] = 1 << 1;
	}
	w->writes = w->npages;
}

static void *
work(void *argument)
{
	struct worker *w = argument;
	uint64_t rate = option.rate * MIB_PAGES / option.threads;	/* pages per second */
	uint64_t written = 0, verified = 0;
	uint32_t next = 0;

	fill(w);
	pthread_barrier_wait(&filled);
	uint64_t start = now_ns(), sweep_start = start;
	for (;;) {
		uint64_t now = now_ns();
		uint64_t write_due = (now - start) * rate / SECOND_NS;
		uint64_t verify_due = option.sweep == 0 ? w->npages :
		    (now - sweep_start) * w->npages / (option.sweep * 1000000);
		bool idle = true;

		/* Drop a debt of more than a quarter second; the rate then sinks. */
		if (write_due > written + rate / 4 + BATCH_PAGES)
			written = write_due - rate / 4 - BATCH_PAGES;
		for (uint32_t i = 0; i < BATCH_PAGES && written < write_due; idle = false) {
			uint32_t n = write_some(w);
			written += n;
			i += n;
		}
		atomic_store(&w->published_writes, w->writes);
		for (uint32_t i = 0; i < BATCH_PAGES && verified < verify_due && next < w->npages; i++) {
			verify(mine(w, next++));
			verified++;
			idle = false;
		}
		if (next == w->npages) {
			end_sweep(w);
			next = 0;
			verified = 0;
			sweep_start = now_ns();
		}
		if (idle)
			sleep_until(now + NAP_NS);
	}
	return NULL;
}

/*
 * Numbered blocks on the disk: each is written with its next generation or
 * read back and compared, in turn.  The expected generations live in memory,
 * so memory and disk must arrive together and agree.
 */
static void *
exercise_disk(void *argument)
{
	static uint32_t expected[DISK_MAX_BLOCKS];
	uint64_t bytes, rng = option.seed ^ 0xd15cull, *block;
	uint32_t cursor = 0;
	int fd = *(int *)argument;

	if (ioctl(fd, BLKGETSIZE64, &bytes) != 0)
		fail("size of /dev/vda");
	uint32_t nblocks = bytes / PAGE_BYTES < DISK_MAX_BLOCKS ?
	    (uint32_t)(bytes / PAGE_BYTES) : DISK_MAX_BLOCKS;
	if (nblocks == 0) {
		errno = ENOSPC;
		fail("/dev/vda");
	}
	if (posix_memalign((void **)&block, PAGE_BYTES, PAGE_BYTES) != 0)
		fail("disk buffer");
	for (uint64_t turn = 0;; turn++) {
		uint32_t b = (uint32_t)(next_random(&rng) % nblocks);
		off_t at = (off_t)b * PAGE_BYTES;

		page_write(block, b, expected[b] + 1);
		if (pwrite(fd, block, PAGE_BYTES, at) != (ssize_t)PAGE_BYTES)
			fail("write to /dev/vda");
		expected[b]++;
		if (turn % 16 == 0 && fdatasync(fd) != 0)
			fail("fdatasync of /dev/vda");
		cursor = (cursor + 1) % nblocks;
		if (expected[cursor] != 0) {
			if (pread(fd, block, PAGE_BYTES, (off_t)cursor * PAGE_BYTES) !=
			    (ssize_t)PAGE_BYTES)
				fail("read from /dev/vda");
			if (page_check(block, cursor, expected[cursor]) != PAGE_WORDS &&
			    count_bad()) {
				if (block[0] == MAGIC)
					say("BAD block=%u want=%u got=%u", cursor,
					    expected[cursor], (uint32_t)(block[1] >> 32));
				else
					say("BAD block=%u want=%u got=garbage", cursor,
					    expected[cursor]);
			}
			atomic_fetch_add(&disk_operations, 1);
		}
		atomic_fetch_add(&disk_operations, 1);
		sleep_until(now_ns() + DISK_NAP_NS);
	}
	return NULL;
}

/* Print a line each 100 ms.  A late line delays the next one; no number is ever left out. */
static _Noreturn void
heartbeat(void)
{
	uint64_t when = now_ns();

	for (uint64_t sequence = 1;; sequence++) {
		uint64_t sweeps = UINT64_MAX, writes = 0;
		char disk[32] = "";

		for (unsigned t = 0; t < option.threads; t++) {
			uint64_t s = atomic_load(&workers[t].sweeps);
			sweeps = s < sweeps ? s : sweeps;
			writes += atomic_load(&workers[t].published_writes);
		}
		if (option.disk)
			snprintf(disk, sizeof(disk), " disk=%llu",
			    (unsigned long long)atomic_load(&disk_operations));
		say("hb %llu sweeps=%llu bad=%llu gen=%llu%s", (unsigned long long)sequence,
		    (unsigned long long)sweeps, (unsigned long long)atomic_load(&bad),
		    (unsigned long long)writes, disk);
		when += HEARTBEAT_NS;
		uint64_t now = now_ns();
		if (when < now)
			when = now;
		sleep_until(when);
	}
}

static void
read_options(void)
{
	static const struct { const char *name; uint64_t *value; } known[] = {
		{ "proof.mib=", &option.mib }, { "proof.work=", &option.work },
		{ "proof.holes=", &option.holes }, { "proof.rate=", &option.rate },
		{ "proof.sweep=", &option.sweep }, { "proof.threads=", &option.threads },
		{ "proof.disk=", &option.disk }, { "proof.seed=", &option.seed },
	};
	char line[4096];
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, line, sizeof(line) - 1);

	if (n < 0)
		fail("/proc/cmdline");
	close(fd);
	line[n] = '\0';
	for (char *save, *word = strtok_r(line, " \n", &save); word != NULL;
	    word = strtok_r(NULL, " \n", &save)) {
		bool taken = strncmp(word, "proof.", 6) != 0;
		for (size_t i = 0; i < sizeof(known) / sizeof(known[0]) && !taken; i++) {
			size_t length = strlen(known[i].name);
			char *end;
			if (strncmp(word, known[i].name, length) != 0)
				continue;
			errno = 0;
			*known[i].value = strtoull(word + length, &end, 10);
			taken = errno == 0 && end != word + length && *end == '\0';
		}
		if (!taken) {
			errno = EINVAL;
			fail(word);
		}
	}
	if (option.threads == 0)
		option.threads = (uint64_t)sysconf(_SC_NPROCESSORS_ONLN);
	if (option.threads > MAX_THREADS || option.mib == 0 || option.mib > 1u << 20 ||
	    option.work + option.holes > option.mib || option.threads > option.mib) {
		errno = EINVAL;
		fail("proof options");
	}
}

/* Load /modules/NN-name.ko in the order of the names; build.py put it there. */
static void
load_modules(void)
{
	struct dirent **entry;
	int n = scandir("/modules", &entry, NULL, alphasort);

	if (n < 0)
		fail("/modules");
	for (int i = 0; i < n; i++) {
		char path[sizeof("/modules/") + 256];
		if (entry[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/modules/%s", entry[i]->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
			fail(entry[i]->d_name);
		close(fd);
	}
}

/* The disk is probed in the background: wait for its node, for at most ten seconds. */
static int
open_disk(void)
{
	uint64_t limit = now_ns() + 10 * SECOND_NS;
	int fd;

	while ((fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC)) < 0) {
		if (now_ns() > limit)
			fail("/dev/vda");
		sleep_until(now_ns() + NAP_NS);
	}
	return fd;
}

static void
open_tty(void)
{
	struct termios settings;

	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	/* Fails with EBUSY if the kernel has mounted it already. */
	mount("devtmpfs", "/dev", "devtmpfs", 0, "");
	tty = open("/dev/ttyS0", O_WRONLY | O_NOCTTY | O_CLOEXEC);
	if (tty >= 0 && tcgetattr(tty, &settings) == 0) {
		cfmakeraw(&settings);
		tcsetattr(tty, TCSANOW, &settings);
	}
	if (mount("proc", "/proc", "proc", 0, "") != 0)
		fail("mount /proc");
	/* Switch compaction off: it moves pages, and leaves old copies at their old places. */
	int fd = open("/proc/sys/vm/compaction_proactiveness", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "0", 1) != 1)
			fail("compaction_proactiveness");
		close(fd);
	}
}

static void *
map_pages(size_t bytes)
{
	const size_t huge = 2u << 20;
	char *p = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		fail("mmap");
	p += (huge - (uintptr_t)p % huge) % huge;
	/* Use huge pages from the start, so that nothing is collapsed, and so moved, later. */
	madvise(p, bytes, MADV_HUGEPAGE);
	return p;
}

static void
start(void *(*function)(void *), void *argument, int cpu)
{
	pthread_attr_t attributes;
	pthread_t thread;
	cpu_set_t set;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 * 1024);
	if (cpu >= 0) {
		CPU_ZERO(&set);
		CPU_SET((unsigned)cpu, &set);
		pthread_attr_setaffinity_np(&attributes, sizeof(set), &set);
	}
	errno = pthread_create(&thread, &attributes, function, argument);
	if (errno != 0)
		fail("thread");
	pthread_attr_destroy(&attributes);
}

static void *
announce(void *argument)
{
	(void)argument;
	pthread_barrier_wait(&filled);
	say("ready");
	return NULL;
}

int
main(void)
{
	static int disk;
	struct sched_param priority = { .sched_priority = 50 };
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	open_tty();
	read_options();
	if (option.disk) {
		load_modules();
		disk = open_disk();
	}
	uint64_t npages = option.mib * MIB_PAGES;
	area = map_pages(npages * PAGE_BYTES);
	table = map_pages(npages * sizeof(*table));
	pthread_barrier_init(&filled, NULL, (unsigned)option.threads + 1);
	for (uint32_t t = 0; t < option.threads; t++) {
		struct worker *w = &workers[t];
		w->id = t;
		w->rng = mix(option.seed * MAX_THREADS + t);
		w->nwork = share(w, option.work * MIB_PAGES);
		w->nholes = share(w, (option.work + option.holes) * MIB_PAGES) - w->nwork;
		w->npages = share(w, npages);
		start(work, w, (int)(t % (uint32_t)cpus));
	}
	start(announce, NULL, -1);
	if (option.disk)
		start(exercise_disk, &disk, -1);
	/* The heartbeat is the clock that the host reads: nothing may delay it. */
	sched_setscheduler(0, SCHED_FIFO, &priority);
	heartbeat();
}
