#!/bin/bash
# Builds demo.oci.tar: an OCI image archive with Debian's static busybox.
#
#   guest/demo/build.sh [--deb busybox-static_VERSION_amd64.deb]
#
# Without --deb the pinned package is fetched with apt-get download. Needs dpkg-deb, tar, gzip.
# The result depends on nothing but the package, this script and the versions of tar and gzip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

version='1:1.35.0-4+deb12u1+b1'
deb_sha256=3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744
# The day that the package was built for Debian 12.
epoch=1778112000

deb=
if [ "${1-}" = --deb ]; then deb=$(realpath "$2"); fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "$deb" ]; then
    (cd "$work" && apt-get download -qq "busybox-static=$version")
    deb=$(echo "$work"/busybox-static_*.deb)
fi
echo "$deb_sha256  $deb" | sha256sum --check --quiet || {
    echo "build.sh: $deb is not busybox-static $version" >&2
    exit 125
}

export LC_ALL=C TZ=UTC
umask 022
dpkg-deb -x "$deb" "$work/deb"
root=$work/root
mkdir -p "$root"/{bin,dev,etc,home/demo,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin,usr/share/doc/busybox-static,var/tmp}
chmod 1777 "$root/tmp" "$root/var/tmp"
chmod 700 "$root/root"
cp "$work/deb/bin/busybox" "$root/bin/busybox"
chmod 755 "$root/bin/busybox"
cp "$work/deb/usr/share/doc/busybox-static/copyright" "$root/usr/share/doc/busybox-static/copyright"
"$root/bin/busybox" --list-full | while read -r applet; do
    # Debian's list has some twice, and busybox itself.
    [ -e "$root/$applet" ] || ln -s /bin/busybox "$root/$applet"
done

printf 'root:x:0:0:root:/root:/bin/sh\ndemo:x:1000:1000:demo:/home/demo:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' > "$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nusers:x:100:demo\ndemo:x:1000:\nnogroup:x:65534:\n' > "$root/etc/group"
cat > "$root/etc/os-release" <<END
ID=skerry-demo
NAME="Skerry demo"
PRETTY_NAME="Skerry demo (busybox-static $version of Debian 12)"
END

archive() {
    tar --sort=name --mtime="@$epoch" --numeric-owner --owner=0 --group=0 --format=ustar "$@"
}
digest() { sha256sum "$1" | cut -d' ' -f1; }
layout=$work/layout
blobs=$layout/blobs/sha256
mkdir -p "$blobs"
# Puts a file among the blobs; prints its descriptor's digest and size.
blob() {
    local sum; sum=$(digest "$1")
    cp "$1" "$blobs/$sum"
    printf '"digest":"sha256:%s","size":%d' "$sum" "$(stat -c %s "$1")"
}

archive -C "$root" --owner=0 -cf "$work/layer.tar" --exclude=./home/demo .
# The one directory that isn't root's.
tar --mtime="@$epoch" --numeric-owner --owner=1000 --group=1000 --format=ustar -C "$root" -rf "$work/layer.tar" ./home/demo
diff_id=$(digest "$work/layer.tar")
gzip -9n < "$work/layer.tar" > "$work/layer.tar.gz"
layer=$(blob "$work/layer.tar.gz")

created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)
cat > "$work/config.json" <<END
{"created":"$created","architecture":"amd64","os":"linux","config":{"Env":["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["/bin/sh"],"WorkingDir":"/","Labels":{"org.opencontainers.image.title":"Skerry demo","org.opencontainers.image.licenses":"GPL-2.0-only"}},"rootfs":{"type":"layers","diff_ids":["sha256:$diff_id"]},"history":[{"created":"$created","created_by":"guest/demo/build.sh: busybox-static $version"}]}
END
config=$(blob "$work/config.json")
cat > "$work/manifest.json" <<END
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",$config},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",$layer}]}
END
manifest=$(blob "$work/manifest.json")
printf '{"imageLayoutVersion":"1.0.0"}' > "$layout/oci-layout"
cat > "$layout/index.json" <<END
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",$manifest,"platform":{"architecture":"amd64","os":"linux"},"annotations":{"org.opencontainers.image.ref.name":"demo"}}]}
END
archive -C "$layout" -cf "$work/demo.oci.tar" --transform='s,^\./,,' oci-layout index.json blobs
cp "$work/demo.oci.tar" "$here/demo.oci.tar"
(cd "$here" && sha256sum demo.oci.tar > demo.oci.tar.sha256 && cat demo.oci.tar.sha256 && ls -l demo.oci.tar)
