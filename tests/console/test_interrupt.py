"""SIGTERM and SIGHUP end a command as Ctrl-C does."""

import signal
import subprocess
import sys

import pytest

COMMAND = """
import signal, sys, time
from barber_jax.console import exit_with_one_line, interrupt
{setup}
def main():
    try:
        {body}
    except KeyboardInterrupt:
        print("cleaned up", flush=True)
        raise
exit_with_one_line(main)
"""


WAIT = 'print("ready", flush=True); time.sleep(60)'


def end(number, body=WAIT, setup=""):
    """Send a signal to a command that has printed "ready"; its exit status, what else it printed, and its stderr."""
    code = COMMAND.format(body=body, setup=setup)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# A shell may have set the signals to be ignored.
PLAIN = (
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGTERM, signal.SIG_DFL); "
    "signal.signal(signal.SIGINT, signal.default_int_handler)"
)


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, "error: interrupted by SIGTERM\n"),
        (signal.SIGHUP, 129, "error: interrupted by SIGHUP\n"),
    ],
)
def test_a_signal_ends_the_command_after_its_clean_up(number, status, line):
    assert end(number, setup=PLAIN) == (status, "cleaned up\n", line)


def test_under_nohup_a_hangup_is_ignored():
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert end(signal.SIGHUP, WAIT.replace("60", "1") + "; print('done')", ignored) == (0, "done\n", "")


def test_further_signals_do_not_disturb_the_clean_up():
    body = f"""
        try:
            {WAIT}
        finally:
            signal.raise_signal(signal.SIGHUP); signal.raise_signal(signal.SIGTERM); print("undisturbed")"""
    status, out, err = end(signal.SIGTERM, body, PLAIN)
    assert (status, out, err) == (143, "undisturbed\ncleaned up\n", "error: interrupted by SIGTERM\n")


def test_deferred_until_all_steps_are_done():
    body = f"""
        with interrupt.deferred():
            with interrupt.deferred():
                {WAIT.replace("60", "1")}
            print("all steps")
        print("never")"""
    assert end(signal.SIGTERM, body, PLAIN)[:2] == (143, "all steps\ncleaned up\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("last", "status"), [("pass", 0), ("sys.exit(7)", 7), ("raise MemoryError", 2)])
def test_a_signal_after_the_end_does_not_change_the_status(number, last, status):
    body = f"""
        import atexit
        atexit.register(lambda: print("ready", flush=True) or time.sleep(1))
        {last}"""
    assert end(number, body, PLAIN)[0] == status


SWALLOWED = """
        import gc
        def collected(phase, info):
            gc.callbacks.clear()
            {body}
        gc.callbacks.append(collected)
        gc.collect()
        {then}
        interrupt.check()
        print("never")"""


def test_an_interrupt_that_cannot_be_raised_is_raised_later():
    """As in JAX's callback of the garbage collector, where Python prints a traceback of whatever is raised."""
    body = SWALLOWED.format(body=WAIT, then="")
    assert end(signal.SIGTERM, body, PLAIN) == (143, "cleaned up\n", "error: interrupted by SIGTERM\n")


def test_any_other_exception_that_cannot_be_raised_is_told():
    status, _, err = end(signal.SIGTERM, SWALLOWED.format(body="raise ValueError('odd')", then=WAIT), PLAIN)
    assert status == 143 and "Traceback" in err and "ValueError: odd" in err


def test_a_forked_worker_dies_of_the_signal_that_ends_it():
    code = """
import os, signal, sys, time
from barber_jax.console import interrupt
signal.signal(signal.SIGTERM, signal.SIG_DFL)
interrupt.install_handler()
child = os.fork()
if not child:
    signal.raise_signal(signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (process.stdout, process.stderr) == ("-15\n", "")
