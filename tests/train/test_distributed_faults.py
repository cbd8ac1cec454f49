"""Processes that die, hang, are told to stop, or live on two hosts that are cut off from each other."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.distributed.kills import LAYOUTS, RECIPE, command, kill, launch, logged, newest, torture, workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sends signals"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "faults.yaml"
    path.write_text(RECIPE)
    return path


def wait_for_step(run: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not (steps := logged(run)) or steps[-1][0] < step:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"update {step} was not reached"
        time.sleep(0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(layout: str, tmp_path: Path) -> None:
    count = torture(layout, tmp_path, kills=4, inside=2, seed=1)
    assert count["kills"] == 4
    assert count["inside"] >= 1


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_sigterm_to_one_process_checkpoints_and_ends_all(recipe: Path, tmp_path: Path, layout: str) -> None:
    run = tmp_path / "run"
    process = launch(command(layout, recipe, run, 100_000))
    wait_for_step(run, 15, process)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    step = logged(run)[-1][0]
    assert newest(run) == step
    assert f"stopped at step {step} of 100000; the same command resumes" in output


def test_sigterm_to_torchrun_checkpoints_too(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(command("sharded", recipe, run, 100_000))
    wait_for_step(run, 15, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert newest(run) == logged(run)[-1][0], output


@pytest.mark.parametrize(
    ("layout", "number", "timeout"),
    [("replicated", signal.SIGKILL, 600), ("sharded", signal.SIGKILL, 600), ("replicated", signal.SIGSTOP, 5)],
)
def test_a_dead_or_hanging_process_ends_the_job_with_a_message(
    recipe: Path, tmp_path: Path, layout: str, number: signal.Signals, timeout: int
) -> None:
    run = tmp_path / "run"
    words = [*command(layout, recipe, run, 100_000), "--train.parallel.timeout", str(timeout)]
    process = launch(words)
    wait_for_step(run, 15, process)
    children = workers(process.pid)
    began = time.monotonic()
    os.kill(children[1], number)
    output, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "process 0 of 2 lost another one" in output
    assert "goes on from the last checkpoint" in output
    assert time.monotonic() - began < 120
    with contextlib.suppress(ProcessLookupError):
        os.kill(children[1], signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small file system")
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        process = launch(command("sharded", recipe, run, 100_000))
        wait_for_step(run, 11, process)
        (folder / "filler").write_bytes(b"\0" * (shutil.disk_usage(folder).free - 20_000))
        kept = newest(run)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "cannot write checkpoint" in output
        assert "No space left on device" in output
        assert f"the last checkpoint is still step_{newest(run):08d}" in output
        assert newest(run) >= kept > 0
        (folder / "filler").unlink()
        step = newest(run) + 10
        again = launch(command("sharded", recipe, run, step))
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
        assert newest(run) == step
    finally:
        subprocess.run(["umount", folder], check=False)


LATE = """
import os, pathlib, signal, time, torch
from starflow.train.distributed import join_world
again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
there = pathlib.Path(__file__).with_name("there")
if again and os.environ["RANK"] == "1":
    there.touch()
if again and os.environ["RANK"] == "0":
    while not there.exists():
        time.sleep(0.1)
    time.sleep(2)
with join_world(torch.device("cpu"), 60) as world:
    world.all_reduce(torch.ones(1))
    if not again and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
    print("done", world.rank, again)
"""


def test_a_restart_does_not_meet_the_dead(tmp_path: Path) -> None:
    """The first process comes last after a restart: what it stored before must not be taken for it."""
    (tmp_path / "late.py").write_text(LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = launch([*launcher, str(tmp_path / "late.py")])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "done 0 True" in output
    assert "done 1 True" in output


HOSTS = ("starflow-a", "starflow-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: two hosts, as far as a network can tell."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with contextlib.ExitStack() as stack:
        for host in HOSTS:
            if subprocess.run(["ip", "netns", "add", host], check=False).returncode:
                pytest.skip("no network namespaces here")
            stack.callback(ip, "netns", "del", host)
        ip("link", "add", "sf0", "netns", HOSTS[0], "type", "veth", "peer", "name", "sf0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "sf0")
            ip("-n", host, "link", "set", "sf0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS


def host_agent(number: int, recipe: Path, run: Path, steps: int) -> subprocess.Popen[str]:
    """torchrun on one of the hosts, with one process."""
    # A host that comes later never learns the address of a store that torchrun keeps over its restarts.
    variables = ["GLOO_SOCKET_IFNAME=sf0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    enter = ["ip", "netns", "exec", HOSTS[number], "env", *variables]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", f"--local-addr={ADDRESSES[number]}"]
    rendezvous += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=job"]
    rendezvous += [f"--rdzv-conf=is_host={number == 0}"]  # a host name of its own would tell, where hosts have one
    words = ["-m", "starflow", "train", str(recipe), "--output", str(run), "--train.steps", str(steps)]
    words += ["--train.parallel.layout", "sharded", "--device", "cpu"]
    return launch([*enter, sys.executable, "-m", "torch.distributed.run", *rendezvous, *words])


@pytest.mark.parametrize("lost", ["process", "host"])
def test_two_hosts_go_on_after_one_of_them_lost_its_process(
    hosts: tuple[str, str], recipe: Path, tmp_path: Path, lost: str
) -> None:
    """The process of one host is killed, and its agent starts it again, or agent and all are and someone else does.

    The other host's agent waits for it; the run goes on from the last checkpoint and ends as one without a stop.
    """
    steps = 120
    whole = launch(command("sharded", recipe, tmp_path / "whole", steps))
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output
    run = tmp_path / "run"
    agents = [host_agent(number, recipe, run, steps) for number in (0, 1)]
    try:
        wait_for_step(run, 35, *agents)
        if lost == "process":
            (victim,) = workers(agents[1].pid)
            os.kill(victim, signal.SIGKILL)
        else:
            kill(agents[1], everything=True)
            agents[1] = host_agent(1, recipe, run, steps)
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill(agent, everything=True)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert logged(run) == logged(tmp_path / "whole")
