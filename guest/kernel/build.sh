#!/bin/bash
# Builds the guest kernel from Debian's kernel source and puts the image and its manifest here.
#
#   guest/kernel/build.sh [--source linux-source-6.1.tar.xz] [--work DIR] [--jobs N] [--keep] [--check]
#
# Without --source the pinned Debian package is fetched with apt-get download. --keep goes on with the
# objects of an earlier build in DIR. --check compares with the committed image instead of replacing it. Needs: gcc make flex bison bc cpio
# libelf-dev libssl-dev zstd xz-utils.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
source "$here/source.env"

tarball= work=${TMPDIR:-/tmp}/skerry-kernel jobs=$(nproc) check=no keep=no
while [ $# -gt 0 ]; do
    case $1 in
        --source) tarball=$2; shift 2 ;;
        --work) work=$2; shift 2 ;;
        --jobs) jobs=$2; shift 2 ;;
        --check) check=yes; shift ;;
        --keep) keep=yes; shift ;;
        *) echo "build.sh: unknown option $1" >&2; exit 125 ;;
    esac
done

mkdir -p "$work"
if [ -z "$tarball" ]; then
    tarball=$work/usr/src/$SOURCE_TARBALL
    if [ ! -f "$tarball" ]; then
        (cd "$work" && apt-get download "$SOURCE_PACKAGE=$SOURCE_VERSION" \
            && dpkg-deb -x "$SOURCE_PACKAGE"_*.deb .)
    fi
fi
echo "$SOURCE_SHA256  $tarball" | sha256sum --check --quiet || {
    echo "build.sh: $tarball is not the source of $SOURCE_PACKAGE $SOURCE_VERSION" >&2
    exit 125
}

if [ $keep = no ] || [ ! -d "$work/src" ]; then
    rm -rf "$work/src" "$work/obj"
    mkdir -p "$work/src" "$work/obj"
    tar -xf "$tarball" -C "$work/src" --strip-components=1
fi

# Fewer pages around a fault in a file are mapped (README.md, "Fault-around").
sed -i 's/rounddown_pow_of_two(65536)/rounddown_pow_of_two(16384)/' "$work/src/mm/memory.c"
grep -q 'rounddown_pow_of_two(16384)' "$work/src/mm/memory.c" || { echo "build.sh: mm/memory.c is not as expected" >&2; exit 125; }

# Everything that would otherwise leave the time, place or person of the build in the image.
export LC_ALL=C TZ=UTC
export SOURCE_DATE_EPOCH
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$SOURCE_DATE_EPOCH")
export KBUILD_BUILD_TIMESTAMP
export KBUILD_BUILD_USER=skerry KBUILD_BUILD_HOST=skerry KBUILD_BUILD_VERSION=1

cd "$work/src"
make -s O="$work/obj" allnoconfig
scripts/kconfig/merge_config.sh -O "$work/obj" -m "$work/obj/.config" "$here"/config/*.config >/dev/null
make -s O="$work/obj" olddefconfig
# Kconfig drops in silence what it can't satisfy; here that is an error.
for line in $(grep -hE '^CONFIG_[A-Z0-9_]+=[^n]' "$here"/config/*.config | cut -d' ' -f1); do
    grep -qxF "$line" "$work/obj/.config" || { echo "build.sh: $line was not accepted" >&2; exit 125; }
done

make -s O="$work/obj" -j"$jobs" bzImage
image=$work/obj/arch/x86/boot/bzImage

if [ $check = yes ]; then
    cmp "$image" "$here/bzImage-x86_64" && echo "bzImage-x86_64 is what the sources give"
    exit
fi
cp "$image" "$here/bzImage-x86_64"
cp "$work/obj/.config" "$here/config-x86_64"
{
    echo "# Written by build.sh: the image, its configuration, and what they were made from and with."
    echo "image_sha256    $(sha256sum < "$here/bzImage-x86_64" | cut -d' ' -f1)"
    echo "config_sha256   $(sha256sum < "$here/config-x86_64" | cut -d' ' -f1)"
    echo "fragment_sha256 $(cat "$here"/config/*.config | sha256sum | cut -d' ' -f1)"
    echo "source_package  $SOURCE_PACKAGE $SOURCE_VERSION"
    echo "source_sha256   $SOURCE_SHA256"
    echo "release         $(cat "$work/obj/include/config/kernel.release")"
    echo "compiler        $(gcc --version | head -1)"
    echo "linker          $(ld --version | head -1)"
    echo "compressor      $(zstd --version | tr -s ' *' ' ')"
} > "$here/MANIFEST"
cat "$here/MANIFEST"
