#!/usr/bin/env bash
# Compiles csrc/ without csrc/python, Python's edge, and each program of tests/c, and runs the programs.
# Warnings are errors.  A program prints 'N passed, N failed' and exits 0 when none failed.
#
#   .ci/c_tests.sh FOLDER 'COMPILER FLAGS' ['WRAPPER' ['PROGRAMS']]
#
# FOLDER takes objects and programs; without a compiler the programs that lie there are run again.
# WRAPPER is put before each program (an emulator).  PROGRAMS is a pattern for what follows test_ in their names;
# without it all run.  Called by .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 compiler=$2 wrapper=${3-} pattern=${4-*}

# as in setup.py; what the caller adds comes last and wins
flags="-std=c11 -O3 -ffp-contract=off -pthread -Wall -Wextra -Wconversion -Wshadow -Werror -Icsrc"

object() { echo "$folder/$(tr / _ <<<"${1%.c}").o"; }

build() { # COMPILER [FLAG...]
    local sources programs objects=() source program
    mkdir -p "$folder"
    mapfile -t sources < <(find csrc -name '*.c' ! -path 'csrc/python/*' | sort)
    mapfile -t programs < <(find tests/c -name "test_$pattern.c" | sort)
    for source in "${sources[@]}" "${programs[@]}"; do
        printf '%s\0' -c "$source" -o "$(object "$source")"
    done | xargs -0 -n 4 -P "$(nproc)" "$1" $flags "${@:2}"
    for source in "${sources[@]}"; do objects+=("$(object "$source")"); done
    for program in "${programs[@]}"; do
        "$1" $flags "${@:2}" "$(object "$program")" "${objects[@]}" -o "$folder/$(basename "$program" .c)" -lm
    done
}

[ -z "$compiler" ] || build $compiler
status=0 count=0
for program in "$folder"/test_$pattern; do
    [ -x "$program" ] || continue
    # a child forked beside threads hangs in qemu's user mode and in the allocator of gcc 12's ASan
    if [[ $program == *_fork && "$compiler $wrapper" =~ qemu|fsanitize=address ]]; then
        echo "-- $wrapper $(basename "$program") SKIPPED: ${BASH_REMATCH[0]} does not survive fork beside threads"
        continue
    fi
    echo "-- $wrapper $(basename "$program")"
    $wrapper "$program" || { echo "-- exit status $?"; status=1; }
    count=$((count + 1))
done
[ $count -gt 0 ] || { echo "no programs in $folder"; exit 1; }
exit $status
