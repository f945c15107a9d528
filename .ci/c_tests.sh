#!/usr/bin/env bash
# Compiles csrc/ without module.c, Python's edge, and each program of tests/c, and runs the programs.
# Warnings are errors.  A program prints 'N passed, N failed' and exits 0 when none failed.
#
#   .ci/c_tests.sh FOLDER 'COMPILER FLAGS' ['WRAPPER']
#
# FOLDER takes objects and programs, WRAPPER is put before each program (an emulator).  Called by .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 compiler=$2 wrapper=${3-}

# -O3 -ffp-contract=off as in setup.py; flags of the caller come last and win
flags="-std=c11 -O3 -ffp-contract=off -pthread -Wall -Wextra -Wconversion -Wshadow -Werror -Icsrc"
flags="$flags ${compiler#"${compiler%% *}"}"
compiler=${compiler%% *}

mkdir -p "$folder"
object() { echo "$folder/$(echo "${1%.c}" | tr / _).o"; }
mapfile -t sources < <(find csrc -name '*.c' ! -name module.c | sort)
mapfile -t programs < <(find tests/c -name 'test_*.c' | sort)
[ "${#programs[@]}" -gt 0 ] || { echo "no tests/c/test_*.c"; exit 1; }

for source in "${sources[@]}" "${programs[@]}"; do
    echo "$source" "$(object "$source")"
done | xargs -P "$(nproc)" -L 1 sh -c "$compiler $flags -c \"\$0\" -o \"\$1\""

mapfile -t objects < <(for source in "${sources[@]}"; do object "$source"; done)
status=0
for program in "${programs[@]}"; do
    name=$folder/$(basename "$program" .c)
    # shellcheck disable=SC2086  # flags and wrapper are lists of words
    $compiler $flags "$(object "$program")" "${objects[@]}" -o "$name" -lm
    echo "-- $(basename "$name")"
    $wrapper "$name" || { echo "-- $(basename "$name") exits $?"; status=1; }
done
exit $status
