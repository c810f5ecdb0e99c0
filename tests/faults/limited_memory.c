// An allocator that fails where it is told to, preloaded into a process (LD_PRELOAD) with glibc.
//
// It counts the blocks of at least kSmallest bytes: tensors, and the arrays of kernels; of less,
// torch has some whose failure ends the process.
// limit_allocations(n) lets n of them through and fails the one that follows, or all that follow of
// at least kSmallestOfAll: torch makes the text of an error's backtrace where it has lost a block,
// and does not look whether there was memory for that.
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

static const size_t kSmallest = 4096;
static const size_t kSmallestOfAll = 32768;
static atomic_long left = -1;  // -1: none fails
static atomic_int fails_on = 0;
static atomic_long failed = 0;
static atomic_long live_bytes = 0;

extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* block, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* block);

void limit_allocations(long n, int goes_on) {
  atomic_store(&failed, 0);
  atomic_store(&fails_on, goes_on);
  atomic_store(&left, n);
}
long failed_allocations(void) { return atomic_load(&failed); }
long bytes_in_use(void) { return atomic_load(&live_bytes); }

static int fails(size_t size) {
  const size_t smallest = atomic_load(&fails_on) ? kSmallestOfAll : kSmallest;
  if (size < smallest || atomic_load(&left) < 0) return 0;
  const long before = atomic_fetch_sub(&left, 1);
  if (before > 0) return 0;
  if (before < 0) {  // another thread was first
    atomic_store(&left, -1);
    return 0;
  }
  if (atomic_load(&fails_on)) atomic_store(&left, 0);
  atomic_fetch_add(&failed, 1);
  errno = ENOMEM;
  return 1;
}

static void* count(void* block, long sign) {
  const size_t size = block == NULL ? 0 : malloc_usable_size(block);
  if (size >= kSmallest) atomic_fetch_add(&live_bytes, sign * (long)size);
  return block;
}

void* malloc(size_t size) { return fails(size) ? NULL : count(__libc_malloc(size), 1); }

void* calloc(size_t number, size_t size) {
  return fails(number * size) ? NULL : count(__libc_calloc(number, size), 1);
}

void* realloc(void* block, size_t size) {
  if (fails(size)) return NULL;
  count(block, -1);
  void* const moved = __libc_realloc(block, size);
  count(moved == NULL && size > 0 ? block : moved, 1);
  return moved;
}

void* memalign(size_t alignment, size_t size) {
  return fails(size) ? NULL : count(__libc_memalign(alignment, size), 1);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  void* const found = memalign(alignment, size);
  if (found == NULL) return ENOMEM;
  *block = found;
  return 0;
}

void free(void* block) { __libc_free(count(block, -1)); }
