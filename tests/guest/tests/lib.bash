# shellcheck shell=bash
# What the guest tests share: a scratch folder, `upcall serve` in the background, filters,
# and the end of it all, whatever happens. Source it first; then `serve ...`, `guest ...`,
# `stop_server`.
set -euo pipefail

top=$(readlink -f "$(dirname "${BASH_SOURCE[0]}")/../../..")
rig=$top/tests/guest
bin=${UPCALL_BIN_DIR:-$top/target/release}
scratch=$(mktemp -d /tmp/upg.XXXXXX)
server=

finish() {
    local status=$?
    trap - EXIT
    if [ -n "$server" ]; then
        if [ "$status" != 0 ]; then
            echo "--- where requests are now, and two seconds later"
            "$bin/upcall" top --once "$scratch/serve.stats" || true
            sleep 2
            "$bin/upcall" top --once "$scratch/serve.stats" || true
        fi
        kill -KILL "$server" 2>/dev/null || true
    fi
    if [ "$status" != 0 ]; then
        echo "--- end of the server's log"
        tail -n 40 "$scratch/serve.err" 2>/dev/null || true
    fi
    rm -rf "$scratch"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

die() {
    echo "FAILED: $*"
    exit 1
}

# c_filter NAME and rust_filter NAME: print the path of a filter's shared object.
c_filter() { echo "$bin/$1-64.so"; }
rust_filter() { echo "$bin/libupcall_$1.so"; }

# serve ARGUMENT...: starts `upcall serve` and waits until it is ready.
serve() {
    : >"$scratch/serve.out"
    "$bin/upcall" serve --stats "$scratch/serve.stats" "$@" >"$scratch/serve.out" 2>>"$scratch/serve.err" &
    server=$!
    local i
    for ((i = 0; i < 300; i++)); do
        grep -qx ready "$scratch/serve.out" && return
        kill -0 "$server" 2>/dev/null || die "upcall serve ended"
        sleep 0.1
    done
    die "upcall serve is not ready"
}

# stop_server: asks it to end, and expects exit status 0.
stop_server() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    server=
    [ "$status" = 0 ] || die "upcall serve ended with status $status"
}

# guest ARGUMENT...: run-guest, with this test's name for the guest's folder.
guest() { "$rig/run-guest" "$@"; }

# ------------------------------------------------- a load that runs while something happens

# start_load VM: what standard input says runs in the guest, in the background, with the
# functions of load.bash. It is to end soon after /tmp/stop is there.
start_load() {
    cat "$rig/tests/load.bash" - >"$scratch/load.sh"
    "$rig/guest-ctl" put "$1" "$scratch/load.sh" /tmp/load.sh
    "$rig/guest-ctl" exec "$1" -c '(bash /tmp/load.sh >/tmp/load.log 2>&1; echo $? >/tmp/load.status) \
        </dev/null >/dev/null 2>&1 &'
}

# expect_load VM: it still runs.
expect_load() {
    "$rig/guest-ctl" exec "$1" -c '[ -e /tmp/load.status ] || exit 0
        cat /tmp/load.log; dmesg | tail -n 5; exit 1' || die "the guest's load has ended"
}

# end_load VM: ends it, and expects that it saw nothing wrong.
end_load() {
    "$rig/guest-ctl" exec "$1" --timeout 200 -c 'touch /tmp/stop
        for ((i = 0; i < 1800; i++)); do [ -s /tmp/load.status ] && break; sleep 0.1; done
        cat /tmp/load.log; dmesg | tail -n 5; [ "$(cat /tmp/load.status)" = 0 ]' ||
        die "the guest's load failed"
}
