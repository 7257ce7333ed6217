"""Several processes on this machine compute one result, and do not outlive each other."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from checkpoints import BASE, write_model
from cli import environment, prune_masks

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.devices import hosts
from barber_jax.masks.mask_file import read_masks

RUN = ["--samples", "4", "--length", "16", "--alpha", "0.3"]


@pytest.fixture
def inputs(tmp_path):
    write_model(tmp_path / "dense", num_hidden_layers=3)
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    return tmp_path


def start(inputs, out, processes, *options, program=("-m", "barber_jax.prune")):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ["--ckpt", inputs / "dense", "--calibration", inputs / "ids.npy", "--out", out, *RUN, *options]
    common += ["--coordinator", f"127.0.0.1:{port}", "--processes", processes]
    return [
        subprocess.Popen(
            list(map(str, [sys.executable, *program, *common, "--process", process])),
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2),
        )
        for process in range(processes)
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--mesh", "data=2,model=2"],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--method", "sparsegpt", "--format", "both"], marks=pytest.mark.slow),
        pytest.param(
            [*("--method", "gblm", "--refine", "2", "--refine-weighting", "gradient"), "--mesh", "data=1,model=4"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_two_processes_of_two_devices_give_the_masks_of_one(options, inputs):
    both = start(inputs, inputs / "two", 2, *options)
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0].splitlines()[0].startswith("4 x cpu")
    # The second process has nothing to say of the run, and wrote nothing: there is one folder.
    assert "blocks" not in said[1]
    alone = options[: options.index("--mesh")] if "--mesh" in options else options
    one = prune_masks(inputs / "one", inputs / "dense", inputs / "ids.npy", *RUN, *alone)
    two = read_masks(inputs / "two" / "masks.safetensors")
    for name, mask in one.items():
        assert np.mean(two.read(name) == mask) >= 0.9995
        assert two.read(name).sum() == mask.sum()
    assert not (inputs / "two.run").exists() and not (inputs / "two.partial").exists()


DYING = """
import os, sys
from barber_jax import prune
from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.devices import hosts
from barber_jax.run import loop
hosts.HEARTBEAT_S = 10
record = loop.Pruning._record
def die(self, index, *rest):
    if index == 1 and "--process 1" in " ".join(sys.argv):
        os._exit(9)
    return record(self, index, *rest)
loop.Pruning._record = die
prune.run(sys.argv[1:])
"""

CUT_OFF = """
import os, sys
from barber_jax import prune
from barber_jax.run import loop
finish = loop.Pruning._record
def die(self, index, *rest):
    if index == 2:
        os._exit(9)
    return finish(self, index, *rest)
loop.Pruning._record = die
prune.run(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_resume_a_run(inputs):
    whole = start(inputs, inputs / "whole", 2)
    said = [process.communicate(timeout=300)[1] for process in whole]
    assert [process.returncode for process in whole] == [0, 0], said
    cut = start(inputs, inputs / "two", 2, program=("-c", CUT_OFF))
    assert [process.wait(timeout=300) for process in cut] == [9, 9]
    both = start(inputs, inputs / "two", 2, "--resume")
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "resuming after 2 of 3 blocks" in said[0]
    for name in ("masks.safetensors", "model.safetensors"):
        assert (inputs / "two" / name).read_bytes() == (inputs / "whole" / name).read_bytes()
    assert not (inputs / "two.run").exists()


@pytest.mark.slow
def test_a_process_that_dies_stops_the_other(inputs):
    began = time.monotonic()
    both = start(inputs, inputs / "two", 2, program=("-c", DYING))
    said = [process.communicate(timeout=150)[1] for process in both]
    assert both[1].returncode == 9
    assert both[0].returncode != 0, said[0]
    assert time.monotonic() - began < 120
    assert not (inputs / "two").exists()


LEAVING = """
import atexit, os, signal, sys
import jax
from barber_jax.console import exit_with_one_line
from barber_jax.devices import hosts
def initialize(*arguments, **settings):
    # With it, JAX takes SIGTERM for itself.
    assert not jax.config.jax_enable_preemption_service
    atexit.register(lambda: os.write(1, b"waiting for the others"))
jax.distributed.initialize = initialize
def main():
    hosts.join("127.0.0.1:1", 2, 1)
    if sys.argv[1] == "stopped":
        signal.raise_signal(signal.SIGTERM)
exit_with_one_line(main)
"""


@pytest.mark.parametrize(
    ("end", "status", "out", "err"),
    [("finished", 0, "waiting for the others", ""), ("stopped", 143, "", "error: interrupted by SIGTERM\n")],
)
def test_a_stopped_process_does_not_wait_for_those_that_wait_for_it(end, status, out, err):
    process = subprocess.run([sys.executable, "-c", LEAVING, end], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout, process.stderr) == (status, out, err)


def test_processes_with_different_options_stop(inputs):
    both = start(inputs, inputs / "two", 2)
    both[1].kill()
    both[1].wait()
    line = list(both[1].args)
    line[line.index("0.3")] = "0.4"
    other = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(2))
    said = [process.communicate(timeout=150)[1] for process in (both[0], other)]
    assert both[0].returncode != 0 and other.returncode != 0
    assert "the processes differ in options or files" in "".join(said)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--coordinator", "here:1"], "give all three"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "not host:port"),
        (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "below --processes 2"),
        (["--coordinator", "here:99999", "--processes", "2", "--process", "0"], "a number from 1 to 65535"),
        (["--coordinator", "here:0", "--processes", "2", "--process", "0"], "a number from 1 to 65535"),
        (["--public-coordinator"], "needs --coordinator"),
    ],
)
def test_bad_process_options(options, complaint):
    with pytest.raises(BarberError, match=complaint):
        PruneConfig.parse("barber_jax.prune", ["--ckpt", "dense", "--out", "out", *options])


@pytest.fixture
def resolver(monkeypatch):
    """Names stand for addresses as in a table; an address stands for itself."""
    table = {"node": "10.0.0.7", "world": "8.8.8.8", "both": ("10.0.0.7", "2001:4860::1"), "me": "127.0.1.1"}

    def resolve(host, port, **_):
        if host == "unknown":
            raise socket.gaierror(-2, "Name or service not known")
        found = table.get(host, "127.0.0.1" if host == "localhost" else host)
        return [(0, 0, 0, "", (each, 0)) for each in ([found] if isinstance(found, str) else found)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("8.8.8.8:1", "is the public address 8.8.8.8: whoever reaches that port can read and change the run"),
        ("world:1", "is the public address 8.8.8.8"),
        ("both:1", "is the public address 2001:4860::1"),
        ("[2001:4860::1]:1", "is the public address 2001:4860::1"),
        ("[::ffff:8.8.8.8]:1", "is the public address"),
        ("100.64.0.1:1", "is the public address"),
        ("0.0.0.0:1", "is every interface of this machine"),
        ("[::]:1", "is every interface of this machine"),
        ("unknown:1", "cannot find this host (Name or service not known)"),
    ],
)
def test_a_public_coordinator_needs_a_word(resolver, monkeypatch, address, says):
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *_, **__: pytest.fail("started"))
    for process in (0, 1):
        with pytest.raises(BarberError) as error:
            hosts.join(address, 2, process)
        assert says in str(error.value)


@pytest.mark.parametrize("address", ["10.0.0.7:1", "node:1", "127.0.0.1:1", "localhost:1", "[::1]:1", "[fd00::1]:1"])
def test_the_coordinator_listens_at_its_address_alone(resolver, monkeypatch, address):
    seen = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
    hosts.join(address, 2, 0)
    assert seen[0]["coordinator_bind_address"] == address
    # Where it must listen at another address than the others connect to, that address is checked too.
    monkeypatch.setenv(hosts.BIND, "10.0.0.9:1")
    hosts.join(address, 2, 0)
    assert seen[1]["coordinator_bind_address"] == "10.0.0.9:1"
    monkeypatch.setenv(hosts.BIND, "0.0.0.0:1")
    with pytest.raises(BarberError, match="every interface"):
        hosts.join(address, 2, 0)
    hosts.join(address, 2, 0, public_coordinator=True)
    assert seen[2]["coordinator_bind_address"] == "0.0.0.0:1"


def test_with_the_word_a_public_coordinator_starts(resolver, monkeypatch):
    seen = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
    hosts.join("world:1", 2, 0, public_coordinator=True)
    assert seen[0]["coordinator_bind_address"] == "world:1"


def test_a_name_that_only_this_machine_knows(resolver, monkeypatch):
    """Debian gives a machine's own name the address 127.0.1.1: the others would wait in vain."""
    monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *_, **__: None)
    with pytest.raises(BarberError, match=r"stands for 127\.0\.1\.1, where other machines do not reach it"):
        hosts.join("me:1", 2, 0)
    hosts.join("me:1", 2, 1)


@pytest.mark.parametrize(
    "said", [{"SLURM_PROCID": "0", "SLURM_NTASKS": "2(x3)"}, {"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": ""}]
)
def test_an_odd_number_of_processes_is_named(said, monkeypatch):
    monkeypatch.setattr(os, "environ", said)
    with pytest.raises(BarberError, match=f"{list(said)[1]}=.* in the environment is no number of processes"):
        hosts.join(None, None, None)


def test_a_cluster_that_jax_cannot_make_out_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise KeyError("SLURM_JOB_ID")

    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(BarberError, match=r"through the cluster's coordinator \(KeyError: 'SLURM_JOB_ID'\)"):
        hosts.join(None, None, None)


@pytest.mark.parametrize(
    ("said", "several"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "x"}, False),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
    ],
)
def test_clusters_are_recognised(said, several, monkeypatch):
    monkeypatch.setattr(os, "environ", {**said, "JAX_PLATFORMS": "cpu"})
    assert hosts.in_cluster() is several
