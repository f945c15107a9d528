/* arm_intrinsics.h: every NEON intrinsic; AArch64 always has them, so no target pragma follows. */
#include <arm_neon.h>
