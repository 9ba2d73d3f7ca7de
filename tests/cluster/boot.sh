#!/usr/bin/env bash
# Process 1 of a test host, in namespaces of its own: gives it a blank copy-on-write disk, a /dev and an sshd.
#
# HOST       its name               DISK    a folder to mount its disk on
# IMAGE      lines "source target": folders of this machine that it sees, read-only
# SHARED     the folder that all hosts see as /mnt/shared
# LOGIN      the user whom sshd lets in with PUBLIC_KEY; none, no sshd
# PROFILE    what a login shell begins with
# PYTHON, UV the interpreter of the image, and what it has in the place of uv
set -euo pipefail

mount --make-rprivate /
mount -t tmpfs -o size=6g,mode=755 disk "$DISK"
mkdir "$DISK/upper" "$DISK/work" "$DISK/root"
root=$DISK/root
mount -t overlay -o "lowerdir=/,upperdir=$DISK/upper,workdir=$DISK/work" root "$root"

# A /dev of its own: nothing that runs here can spoil the machine's.
mount -t tmpfs -o mode=755 dev "$root/dev"
while read -r name minor; do mknod -m 666 "$root/dev/$name" c 1 "$minor"; done <<<$'null 3\nzero 5\nfull 7\nrandom 8\nurandom 9'
mknod -m 666 "$root/dev/tty" c 5 0
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs -o mode=1777,size=50% shm "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0 1 2; do ln -s "/proc/self/fd/$number" "$root/dev/$(sed -n $((number + 1))p <<<$'stdin\nstdout\nstderr')"; done

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
while read -r source target; do
  mkdir -p "$root$target"
  mount --bind "$source" "$root$target"
  mount -o remount,bind,ro "$root$target"
done <<<"$IMAGE"
mkdir -p "$root/mnt/shared"
mount --bind "$SHARED" "$root/mnt/shared"
mkdir "$root/before"
cd "$root"
pivot_root . before
cd /
umount -l /before
rmdir /before

hostname "$HOST"
printf '127.0.0.1 localhost\n' > /etc/hosts
: > /etc/resolv.conf
rm -rf /root/.ssh /root/.ray /root/.aws /root/.netrc  # the machine's own keys are none of the host's
# Others than root reach the image's Python wherever it lies.
while read -r _ target; do
  while [ "$target" != / ]; do
    target=$(dirname "$target")
    [ "$(stat -c %a "$target" | tail -c 2)" -ge 5 ] || chmod o+rx "$target"
  done
done <<<"$IMAGE"
printf '%s\n' "$PROFILE" > /etc/profile.d/image.sh

if [ -n "$LOGIN" ]; then
  id "$LOGIN" > /dev/null 2>&1 || useradd --create-home --shell /bin/bash --password '*' "$LOGIN"
  home=$(getent passwd "$LOGIN" | cut -d: -f6)
  install -d -m 700 "$home/.ssh"
  printf '%s\n' "$PUBLIC_KEY" > "$home/.ssh/authorized_keys"
  install -d "$home/.local" "$home/.local/bin"
  printf '#!%s\n%s\n' "$PYTHON" "$UV" > "$home/.local/bin/uv"
  chmod 755 "$home/.local/bin/uv"
  chown -R "$LOGIN:" "$home"
  install -d -m 755 /run/sshd
  rm -f /etc/ssh/ssh_host_*
  ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/sbin/sshd -D -e -f /dev/null -p 22 -o HostKey=/etc/ssh/ssh_host_ed25519_key -o PidFile=/run/sshd.pid \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o UsePAM=no -o UseDNS=no -o MaxStartups=100 \
    -o PermitRootLogin=no &
fi
trap 'exit 0' TERM
while :; do sleep 3600 & wait $! || true; done  # bash reaps orphans
