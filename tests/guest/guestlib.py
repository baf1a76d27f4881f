"""Boots and drives a small Linux test guest (Python standard library only).

A guest is described by the directory it runs in, which holds:

    guest.json    how it was started
    qemu.pid      process id of QEMU
    qmp.sock      QMP socket, free for the test's own use (one client at a time)
    ctl.sock      second QMP socket, used by this module
    agent.sock    the guest agent (see "Agent protocol" in README.md)
    console.log   the guest's serial console
    qemu.log      standard output and standard error of QEMU
"""

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import time

HERE = os.path.dirname(os.path.realpath(__file__))
MAX_SOCKET_PATH = 107
PAGE = 4096


class RigError(Exception):
    """The rig itself failed (not the script that ran in the guest)."""


class RigTimeout(RigError):
    """Something did not happen in time."""


def env(name, default):
    return os.environ.get(name) or default


def image_directory(path=None):
    """The directory with the kernel and the initramfs segments."""
    path = path or os.environ.get("RIG_IMAGE")
    if not path:
        build = subprocess.run([os.path.join(HERE, "build-guest")],
                               stdout=subprocess.PIPE, text=True)
        if build.returncode != 0:
            raise RigError("build-guest failed")
        path = build.stdout.strip()
    if not os.path.exists(os.path.join(path, "vmlinuz")):
        raise RigError(f"no guest image in {path}")
    return path


def make_initrd(image, segments, target):
    """Concatenates initramfs segments; a segment is a name or a .cpio file."""
    with open(target, "wb") as out:
        for segment in ["base"] + [s for s in segments if s != "base"]:
            path = segment if "/" in segment else os.path.join(image, segment + ".cpio")
            try:
                with open(path, "rb") as archive:
                    while chunk := archive.read(1 << 20):
                        out.write(chunk)
            except OSError as error:
                raise RigError(f"initramfs segment {segment}: {error}") from error
            out.write(b"\0" * (-out.tell() % 512))


def split_disk(text):
    """'PATH,key=value,...' -> (PATH, ['key=value', ...])"""
    path, *options = text.split(",")
    if not path:
        raise RigError(f"disk '{text}' has no path")
    return path, options


def wait_until(condition, timeout, what, interval=0.02):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise RigTimeout(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def connect(path, timeout):
    """Connects to a Unix stream socket, waiting for it to be there."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise RigError(f"socket path is longer than {MAX_SOCKET_PATH} bytes: {path}")
    deadline = time.monotonic() + timeout
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(path)
            return client
        except OSError as error:
            client.close()
            if time.monotonic() > deadline:
                raise RigTimeout(f"cannot connect to {path}: {error}") from error
            time.sleep(0.05)


class Qmp:
    """One QMP session."""

    def __init__(self, path, timeout=10):
        self.socket = connect(path, timeout)
        self.socket.settimeout(timeout)
        self.stream = self.socket.makefile("rb")
        self.events = []
        self.receive()
        self.execute("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.stream.close()
        self.socket.close()

    def receive(self):
        try:
            line = self.stream.readline()
        except TimeoutError as error:
            raise RigTimeout("no answer on the QMP socket") from error
        if not line:
            raise RigError("the QMP socket was closed")
        return json.loads(line)

    def execute(self, command, arguments=None):
        request = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        return self.send(request)

    def send(self, request):
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self.receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise RigError(f"{request.get('execute')}: {message['error']['desc']}")
            else:
                return message.get("return")


class Guest:
    """A running guest; see start() and attach()."""

    def __init__(self, directory):
        self.directory = os.path.abspath(directory)
        self.process = None
        self.agent = None
        self.buffer = b""

    def path(self, name):
        return os.path.join(self.directory, name)

    # ------------------------------------------------------------- lifetime

    @classmethod
    def attach(cls, directory):
        """A guest that another process started."""
        guest = cls(directory)
        if not os.path.exists(guest.path("guest.json")):
            raise RigError(f"no guest was started in {directory}")
        return guest

    @classmethod
    def start(cls, directory, *, disks=(), plain=(), segments=("fs", "fio"),
              image=None, memory=None, cpus=None, machine=None, append="",
              reconnect=1, reboot=False, incoming=False, disk_wait=10, extra=()):
        """Starts QEMU and returns at once; wait_ready() waits for the boot."""
        guest = cls(directory)
        os.makedirs(guest.directory, exist_ok=True)
        if guest.pid() is not None:
            raise RigError(f"a guest is already running in {directory}")
        for name in ("guest.json", "qemu.pid", "qmp.sock", "ctl.sock", "agent.sock", "console.log"):
            if os.path.lexists(guest.path(name)):
                os.unlink(guest.path(name))
        if len(os.fsencode(guest.path("agent.sock"))) > MAX_SOCKET_PATH:
            raise RigError(f"directory name is too long for a Unix socket: {guest.directory}")

        # With "reconnect", QEMU waits without end, and silently, for a peer
        # that isn't there yet. Say what's missing instead.
        for disk in disks:
            path, _ = split_disk(disk)
            wait_until(lambda path=path: os.path.exists(path), disk_wait,
                       f"disk socket {path}", 0.05)

        image = image_directory(image)
        make_initrd(image, segments, guest.path("initrd"))
        command = guest.command_line(image, disks, plain, memory, cpus, machine,
                                     append, reconnect, reboot, incoming, extra)
        with open(guest.path("guest.json"), "w", encoding="utf-8") as out:
            json.dump({"command": command}, out, indent=1)
        with open(guest.path("qemu.log"), "w", encoding="utf-8") as log:
            log.write(shlex.join(command) + "\n")
            log.flush()
            try:
                # A guest that everyone forgot has to end by itself.
                life = ["timeout", "-k", "5", env("RIG_LIFETIME", "3600")]
                guest.process = subprocess.Popen(life + command, stdin=subprocess.DEVNULL, stdout=log,
                                                 stderr=log, start_new_session=True)
            except OSError as error:
                raise RigError(f"cannot run {command[0]}: {error}") from error
        return guest

    def command_line(self, image, disks, plain, memory, cpus, machine,
                     append, reconnect, reboot, incoming, extra):
        memory = memory or env("RIG_MEMORY", "768M")
        cpus = cpus or env("RIG_CPUS", "2")
        machine = machine or env("RIG_MACHINE", "pc")
        accel = env("RIG_ACCEL", "tcg,thread=multi")
        # For a machine that can have but one processor TCG leaves out memory barriers and
        # atomic instructions. The other side of a virtqueue is another processor all the
        # same: now and then a doorbell is not rung, and the guest waits for ever.
        smp = f"{cpus},maxcpus={max(int(cpus), 2)}"
        kernel_arguments = " ".join([
            "console=ttyS0", "quiet", "panic=-1", "oops=panic", "nokaslr", "mitigations=off",
            "random.trust_cpu=on", "audit=0", append, env("RIG_APPEND", "")]).strip()

        command = shlex.split(env("RIG_QEMU", "qemu-system-x86_64")) + [
            "-name", "guest-rig", "-nodefaults", "-no-user-config", "-display", "none",
            *([] if reboot else ["-no-reboot"]), "-accel", accel, "-cpu", env("RIG_CPU", "max"), "-smp", smp,
            # vhost-user peers map the guest's memory: it has to be shared.
            "-machine", f"{machine},memory-backend=mem", "-m", memory,
            "-object", f"memory-backend-memfd,id=mem,size={memory},share=on",
            "-pidfile", self.path("qemu.pid"),
            "-serial", "file:" + self.path("console.log"),
            "-kernel", os.path.join(image, "vmlinuz"), "-initrd", self.path("initrd"),
            "-append", kernel_arguments,
        ]
        for name in ("qmp", "ctl"):
            command += ["-chardev", f"socket,id={name},path={self.path(name + '.sock')},server=on,wait=off",
                        "-mon", f"chardev={name},mode=control"]
        command += [
            "-device", "virtio-serial-pci,addr=0x4",
            "-chardev", f"socket,id=agent,path={self.path('agent.sock')},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=rig.agent",
            "-object", "rng-random,id=rng,filename=/dev/urandom",
            "-device", "virtio-rng-pci,rng=rng,addr=0x5",
        ]

        # The PCI address decides the name in the guest: the first --disk is
        # /dev/vda, and plain disks come last.
        slot = 0x8
        for number, disk in enumerate(disks):
            path, options = split_disk(disk)
            name = f"disk{number}"
            again = reconnect
            for option in [o for o in options if o.startswith("reconnect=")]:
                again = int(option.partition("=")[2])
                options.remove(option)
            if not any(o.startswith("num-queues=") for o in options):
                # QEMU's own default is one per CPU, which it refuses to start
                # with if the peer has fewer.
                options.append("num-queues=1")
            command += [
                "-chardev", f"socket,id={name},path={os.path.abspath(path)},reconnect={again}",
                "-device", ",".join([f"vhost-user-blk-pci,id={name},chardev={name},addr={slot:#x}", *options])]
            slot += 1
        for number, disk in enumerate(plain):
            path, options = split_disk(disk)
            kept = [o for o in options if o.startswith(("format=", "cache=", "discard=", "readonly=", "snapshot="))]
            rest = [o for o in options if o not in kept]
            if not any(o.startswith("format=") for o in kept):
                kept.append("format=raw")
            name = f"plain{number}"
            command += [
                "-drive", ",".join([f"file={path},if=none,id={name}", *kept]),
                "-device", ",".join([f"virtio-blk-pci,id={name},drive={name},addr={slot:#x}", *rest])]
            slot += 1
        if incoming:
            command += ["-incoming", "defer"]
        command += list(extra)
        command += shlex.split(env("RIG_QEMU_ARGS", ""))
        return command

    def pid(self):
        """QEMU's process id, or None if it is not running."""
        if self.process is not None and self.process.poll() is not None:
            return None
        try:
            with open(self.path("qemu.pid"), encoding="ascii") as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        # A stale pid file may name a process that is not ours.
        ours = os.fsencode(self.path("qemu.pid")) in arguments
        return pid if ours and state != "Z" else None

    def wait_ready(self, timeout=None):
        """Waits until the agent answers; returns the seconds that it took."""
        timeout = timeout or float(env("RIG_BOOT_TIMEOUT", "90"))
        started = time.monotonic()
        self.ping(timeout)
        return time.monotonic() - started

    def wait_exit(self, timeout):
        wait_until(lambda: self.pid() is None, timeout, "end of QEMU")

    def stop(self, timeout=10):
        """Ends QEMU in an orderly way, but without shutting the guest down."""
        self.close()
        if self.pid() is None:
            self.kill()
            return
        try:
            with Qmp(self.path("ctl.sock"), timeout) as qmp:
                qmp.execute("quit")
            self.wait_exit(timeout)
        except (RigError, OSError):
            self.kill()

    def kill(self):
        """Ends QEMU with SIGKILL: for the disk, a power failure."""
        self.close()
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        elif self.process is not None and self.process.poll() is None:
            # QEMU hangs before it has written its pid file.
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        else:
            self.wait_exit(10)

    # ------------------------------------------------------------------ QMP

    def qmp(self, command, arguments=None, timeout=10):
        with Qmp(self.path("ctl.sock"), timeout) as qmp:
            return qmp.execute(command, arguments)

    def migrate(self, target, timeout=120, parameters=None, cancel_at=None, while_it_runs=None):
        """Migrates to a guest started with incoming=True; returns the last query-migrate.
        With cancel_at, cancels when so many bytes were transferred: then this guest goes on.
        while_it_runs() is called once, after the same number of bytes or at once."""
        uri = "unix:" + target.path("migrate.sock")
        target.qmp("migrate-incoming", {"uri": uri})
        self.close()
        with Qmp(self.path("ctl.sock")) as qmp:
            if parameters:
                qmp.execute("migrate-set-parameters", parameters)
            qmp.execute("migrate", {"uri": uri})
            deadline = time.monotonic() + timeout
            while True:
                status = qmp.execute("query-migrate")
                state = status.get("status")
                if state == "completed":
                    break
                if state in ("failed", "cancelled"):
                    if state == "cancelled" and cancel_at is not None:
                        return status
                    raise RigError(f"migration {state}: {status.get('error-desc', '')}")
                sent = status.get("ram", {}).get("transferred", 0)
                if while_it_runs and state == "active" and sent > 0:
                    while_it_runs()
                    while_it_runs = None
                if time.monotonic() > deadline or cancel_at is not None and sent > cancel_at:
                    qmp.execute("migrate_cancel")
                    if cancel_at is None:
                        raise RigTimeout(f"migration: not within {timeout:g} s ({status})")
                time.sleep(0.1)
        if cancel_at is not None:
            raise RigError("the migration was over before it could be cancelled")

        def running():
            return target.qmp("query-status")["status"] == "running"
        wait_until(running, 30, "start of the target guest", 0.1)
        return status

    def blocked_tasks(self):
        """Has the guest print its blocked tasks on the console (SysRq-w)."""
        self.qmp("human-monitor-command", {"command-line": "sendkey alt-sysrq-w"})
        time.sleep(2)

    # ---------------------------------------------------------------- agent

    def close(self):
        """Drops the connection to the agent."""
        if self.agent is not None:
            self.agent.close()
        self.agent = None
        self.buffer = b""

    def failure(self, what):
        if self.process is not None and self.process.poll() is not None:
            what += f" (QEMU ended with status {self.process.returncode})"
        parts = [what]
        for name, text in (("console log", self.console(20)),
                           ("QEMU's log", tail(self.path("qemu.log"), 5, skip=1))):
            if text:
                parts.append(f"end of {name}:\n{text}")
        return RigError("\n".join(parts))

    def console(self, lines):
        return tail(self.path("console.log"), lines)

    def ping(self, timeout):
        """Connects to the agent and waits for its answer."""
        self.close()
        deadline = time.monotonic() + timeout
        while self.agent is None:
            if self.process is not None and self.process.poll() is not None:
                raise self.failure("the guest does not start")
            try:
                self.agent = connect(self.path("agent.sock"), 0.2)
            except RigTimeout as error:
                if time.monotonic() > deadline:
                    raise self.failure("QEMU does not start (waiting for a peer?)") from error
        tag = secrets.token_hex(8)
        # The empty line ends whatever an earlier client left unfinished.
        self.agent.sendall(f"\nPING {tag}\n".encode())
        try:
            self.answer(tag, deadline, lambda data: None)
        except RigTimeout as error:
            raise RigTimeout(str(self.failure(f"the guest does not answer within {timeout:g} s"))) from error

    def answer(self, tag, deadline, sink):
        """Passes output to sink until the line that ends it; returns its status."""
        end = re.compile(rb"\n" + tag.encode() + rb" rc=(\d+)\n")
        keep = len(tag) + 16
        while True:
            found = end.search(self.buffer)
            if found:
                sink(self.buffer[:found.start()])
                self.buffer = self.buffer[found.end():]
                return int(found.group(1))
            if len(self.buffer) > keep:
                sink(self.buffer[:-keep])
                self.buffer = self.buffer[-keep:]
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise RigTimeout("the guest's agent did not answer in time")
            self.agent.settimeout(left)
            try:
                data = self.agent.recv(1 << 16)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                self.close()
                time.sleep(0.2)
                raise self.failure("the guest is gone")
            self.buffer += data

    def request(self, header, payload, timeout, sink):
        if self.agent is None:
            self.ping(timeout)
        tag = secrets.token_hex(8)
        verb, _, rest = header.partition(" ")
        padding = b"\0" * (-len(payload) % PAGE)
        deadline = time.monotonic() + timeout
        self.agent.settimeout(timeout)
        try:
            self.agent.sendall(f"{verb} {tag} {rest}\n".encode() + payload + padding)
        except OSError as error:
            raise self.failure(f"connection to the guest's agent: {error}") from error
        return self.answer(tag, deadline, sink)

    def run(self, script, timeout=120, sink=None):
        """Runs a bash script in the guest. Returns (status, output); the status
        is 124 if the script did not end in time (137 if it had to be killed).
        With a sink, output goes there as it arrives. If even the guest's own
        time limit has no effect (a task that waits for IO cannot be killed),
        RigTimeout is raised."""
        if isinstance(script, str):
            script = script.encode()
        output = []
        limit = max(1, int(timeout))
        status = self.request(f"RUN {limit} {len(script)}", script, limit + 15, sink or output.append)
        return status, b"".join(output).decode(errors="replace")

    def check(self, script, timeout=120):
        """Runs a bash script that has to succeed; returns its output."""
        status, output = self.run(script, timeout)
        if status != 0:
            raise RigError(f"status {status} of guest script: {script}\n{output}")
        return output

    def put(self, source, target, timeout=120):
        """Copies a file of the host into the guest, with its mode."""
        with open(source, "rb") as file:
            data = file.read()
            mode = os.fstat(file.fileno()).st_mode & 0o777
        status = self.request(f"PUT {len(data)} {mode:o} {target}", data, timeout, lambda data: None)
        if status != 0:
            raise RigError(f"cannot write {target} in the guest (status {status})")

    def get(self, source, timeout=120):
        """The content of a file of the guest."""
        output = []
        status = self.request(f"GET {source}", b"", timeout, output.append)
        if status != 0:
            raise RigError(f"cannot read {source} in the guest (status {status})")
        return b"".join(output)


def tail(path, lines, skip=0):
    """The last lines of a file, without its first ones."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[skip:][-lines:]).rstrip()
    except OSError:
        return ""


def script_with_arguments(text, arguments):
    """A script that finds its arguments in $1, $2, ..."""
    return f"set -- {shlex.join(arguments)}\n{text}" if arguments else text
