package uml_test

import (
	"strings"
	"testing"

	"cleancut/internal/uml"
)

// TestStripeOfReflinkedVolumes is what this package is for: md RAID 0 over four loop devices over files on an XFS pool, frozen, cloned
// by reflink, thawed, and the clones assembled beside the original.
func TestStripeOfReflinkedVolumes(t *testing.T) {
	t.Parallel()
	r := run(t, uml.Guest{Scratch: 4 << 30, Args: sh(`set -ex
		mkfs.xfs -q -m reflink=1 /dev/ubda
		mkdir /pool /data /copy
		mount /dev/ubda /pool
		cd /pool
		for i in 0 1 2 3; do
			truncate -s 512M v$i
			losetup --direct-io=on --sector-size 4096 --find --show v$i
		done >loops
		mdadm --create /dev/md0 --run --level=0 --chunk=64 --raid-devices=4 --homehost=any $(cat loops)
		mkfs.xfs -q /dev/md0
		mount /dev/md0 /data
		head -c 5000000 /dev/urandom >/data/file
		fsfreeze --freeze /data
		for i in 0 1 2 3; do cp --reflink=always v$i c$i & done; wait
		fsfreeze --unfreeze /data
		sum=$(md5sum </data/file)
		echo later >/data/later
		for i in 0 1 2 3; do
			losetup --direct-io=on --sector-size 4096 --find --show c$i
		done >copies
		mdadm --assemble /dev/md1 --update=uuid --run $(cat copies)
		mount -o nouuid /dev/md1 /copy
		[ "$sum" = "$(md5sum </copy/file)" ]
		[ ! -e /copy/later ]
		umount /copy /data
		mdadm --stop /dev/md0 /dev/md1
		echo sound`)})
	if r.status != 0 || !strings.HasSuffix(r.stdout, "sound\n") {
		t.Errorf("got status %d, stdout %q, stderr:\n%s", r.status, r.stdout, r.stderr)
	}
}

func TestDeviceMapperAndModprobeWork(t *testing.T) {
	t.Parallel()
	r := run(t, uml.Guest{Modules: []string{"dm-snapshot"}, Scratch: 1 << 30, Args: sh(`set -e
		modprobe dm-flakey
		dmsetup --version >/dev/null
		echo "0 204800 linear /dev/ubda 0" | dmsetup create --noudevsync half
		dmsetup mknodes
		mkfs.ext4 -q /dev/mapper/half
		mount /dev/mapper/half /mnt
		umount /mnt
		dmsetup remove --noudevsync half
		grep -q ^dm_snapshot /proc/modules
		ping -c1 -W1 127.0.0.1 >/dev/null 2>&1 || exec 3<>/dev/tcp/127.0.0.1/1 || true
		cat /sys/class/net/lo/flags`)})
	if r.status != 0 || r.stdout != "0x9\n" { // IFF_UP | IFF_LOOPBACK
		t.Errorf("got status %d, stdout %q, stderr:\n%s", r.status, r.stdout, r.stderr)
	}
}
