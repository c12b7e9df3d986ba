#!/bin/bash
# The first process of the guest. Its folder is the exchange folder made by the host's runner; lists in there are NUL-separated and
# read with mapfile, so no argument is ever seen by a shell parser. What this script prints goes to console.log. Starting a program
# costs 15 to 50 ms in this kernel, so what one program can do at once is done at once.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
x=${0%/*}

off() { # no halt or poweroff: they are not in Debian's base
    # Until the guest's own proc is mounted /proc is the host's, through hostfs, and sysrq would turn off the host: be sure.
    # The end of the first process is a kernel panic, which panic=-1 and noreboot make the end of the guest.
    [[ $(</proc/cpuinfo) == *'User Mode Linux'* ]] || exit 1
    echo o >/proc/sysrq-trigger
    while :; do sleep 1; done
}
fail() {
    echo "cleancut-init: $*"
    off
}

mount -t proc proc /proc || fail "mount proc"
mapfile -d '' -t settings <"$x/settings" || fail "read settings"
mapfile -d '' -t modules <"$x/modules" || fail "read modules"
dir=${settings[0]} hostname=${settings[1]} shares=${settings[2]}
modprobe -d "$x" -a "${modules[@]}" || fail "load modules ${modules[*]}"

# The new root: the host's files, with every change kept in the guest's memory. Relative names, because ":" and "," in the path of
# the exchange folder would need escapes in overlay's options.
mount -t tmpfs -o mode=0755,size=80% tmpfs "$x/mnt" || fail "mount tmpfs"
cd "$x/mnt" && mkdir upper work root || fail "make overlay folders"
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work,redirect_dir=on overlay root || fail "mount overlay"
cd root || fail "enter overlay"
mount -a -T "$x/fstab" || fail "mount fstab"
umask 0
cp -rP "$x/skeleton/." . || fail "copy skeleton"
umask 022
pivot_root . run/cleancut/oldroot || fail "pivot_root"
cd / && umount -l /run/cleancut/oldroot || fail "leave the old root"
x=/run/cleancut/exchange

echo "$hostname" >/proc/sys/kernel/hostname
# ip (iproute2) is not in Debian's base, perl-base is. 0x8914 is SIOCSIFFLAGS, 0x41 IFF_UP|IFF_RUNNING (netdevice(7)).
ip link set lo up 2>/dev/null ||
    perl -e 'socket(S, 2, 2, 0) && ioctl(S, 0x8914, pack("a16 s x22", "lo", 0x41)) or die "lo: $!\n"' ||
    echo "cleancut-init: no loopback network"
ulimit -Hn 524288
ulimit -c 0

mapfile -d '' -t args <"$x/args" || fail "read args"
mapfile -d '' -t env <"$x/env" || fail "read env"
# Pipes, not the files themselves: a program that opens /dev/stderr anew would truncate a file.
cat "$x/stdout.pipe" >>"$x/stdout" &
out=$!
cat "$x/stderr.pipe" >>"$x/stderr" &
err=$!
# A sign of life that the runner watches, and an ear for its last question: which tasks are blocked, to the console.
while :; do
    echo "$SECONDS" >"$x/alive"
    [[ -e $x/stuck && ! -e $x/told ]] && echo w >/proc/sysrq-trigger && : >"$x/told"
    sleep 2
done &
alive=$!
via=()
[[ ${args[0]} == *=* ]] && via=(/usr/bin/setsid --) # env takes a program with = in its name for a variable
: >"$x/started"
(
    cd -- "$dir" || exit 126
    exec /usr/bin/env -i -- "${env[@]}" "${via[@]}" "${args[@]}"
) </dev/null >"$x/stdout.pipe" 2>"$x/stderr.pipe"
status=$?
kill "$alive"
# What the program left running may hold the pipes open: two seconds for what is still in them.
{ sleep 2; kill "$out" "$err"; } &
wait "$out" "$err"
((shares)) && sync -f "$x/settings" # hostfs writes through, but for mmap; the scratch disk is thrown away
echo "$status" >"$x/exit"
off
