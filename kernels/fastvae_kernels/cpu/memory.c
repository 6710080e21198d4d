/* Pages of 2 MiB for memory that the system gives a page of 4 KiB at a time otherwise. */

#define _DEFAULT_SOURCE
#include <stdint.h>
#include <sys/mman.h>

#define PAGE (UINT64_C(2) << 20)

/* Ask for large pages in the part of this memory that consists of whole ones. Without them, as where the system gives
none, the memory is the same. */
void fastvae_huge_pages(void *memory, int64_t bytes) {
    const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (first < end)
        madvise((void *)first, end - first, MADV_HUGEPAGE);
}
