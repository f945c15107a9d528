/* x86_intrinsics.h: every x86 intrinsic.  Included before a target pragma, which clang would also put on system headers. */
#include <immintrin.h>
