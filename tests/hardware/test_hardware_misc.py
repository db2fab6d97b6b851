"""Precision, throughput, environment, compiler and a world of one."""

import getpass
import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from poise.core.errors import UserError
from poise.hardware import compiler, distributed, precision, sharding, throughput
from poise.hardware.environment import describe

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


class TestPrecision:
    def test_names(self):
        assert precision.pick_dtype("fp32", CPU) is torch.float32
        assert precision.pick_dtype("bf16", "cpu") is torch.bfloat16
        with pytest.raises(UserError, match="dtype is 'fp16', but must be auto, bf16 or fp32"):
            precision.pick_dtype("fp16", CPU)

    @pytest.mark.parametrize(("speedup", "dtype"), [(2.2, torch.bfloat16), (1.0, torch.float32), (0.1, torch.float32)])
    def test_auto_on_a_cpu_follows_the_measurement(self, monkeypatch, speedup, dtype):
        monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda: speedup)
        assert precision.pick_dtype("auto", CPU) is dtype

    def test_the_measurement_is_one_number_kept(self):
        assert 0.001 < precision.cpu_bf16_speedup() < 100
        assert precision.cpu_bf16_speedup() == precision.cpu_bf16_speedup()

    @pytest.mark.parametrize("native", [True, False])
    def test_gpu(self, monkeypatch, native):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
        assert precision.pick_dtype("auto", "cuda:0") is (torch.bfloat16 if native else torch.float32)
        if not native:
            with pytest.raises(UserError, match="Old GPU lacks it; use fp32"):
                precision.pick_dtype("bf16", "cuda:0")


class TestThroughput:
    def test_matmul_rate_is_the_operations_over_the_time(self):
        rate = throughput.matmul_rate(torch.float32, "cpu", size=256, tries=2)
        assert 1e8 < rate < 1e14
        assert throughput.matmul_rate(torch.float32, "cpu", size=256, tries=2) == rate  # measured once

    def test_meter_at_a_steady_rate(self):
        meter = throughput.Meter(total_tokens=1000)
        assert meter.tokens_per_second == 0.0
        assert meter.eta_seconds is None
        meter.start(now=10.0)
        for i in range(1, 5):
            meter.update(100, now=10.0 + 2 * i)
            assert meter.tokens_per_second == pytest.approx(50.0)
            assert meter.eta_seconds == pytest.approx((1000 - 100 * i) / 50)

    def test_meter_forgets_at_its_half_life(self):
        meter = throughput.Meter(half_life_s=10.0)
        meter.start(now=0.0)
        meter.update(10_000, now=1000.0)  # long and slow: 10 per second
        meter.update(1000, now=1010.0)  # one half life at 100 per second
        # Weights: the old one by half; so (5000 + 1000) tokens in (500 + 10) seconds.
        assert meter.tokens_per_second == pytest.approx(6000 / 510)
        for i in range(1, 21):
            meter.update(1000, now=1010.0 + 10 * i)
        assert meter.tokens_per_second == pytest.approx(100.0, rel=0.01)

    def test_meter_does_not_count_pauses_or_what_was_before_a_resume(self):
        meter = throughput.Meter(total_tokens=500, done_tokens=300)
        meter.start(now=0.0)
        meter.update(50, now=1.0)
        meter.start(now=100.0)  # a save took 99 s
        meter.update(50, now=101.0)
        assert meter.tokens_per_second == pytest.approx(50.0)
        assert meter.done_tokens == 400
        assert meter.eta_seconds == pytest.approx(2.0)
        meter.update(500, now=102.0)
        assert meter.eta_seconds == 0.0

    def test_meter_without_a_start_measures_from_the_first_update(self):
        meter = throughput.Meter()
        meter.update(7, now=5.0)
        assert meter.tokens_per_second == 0.0
        meter.update(7, now=6.0)
        assert meter.tokens_per_second == 7.0
        with pytest.raises(UserError, match="half_life_s is 0"):
            throughput.Meter(half_life_s=0)

    def test_peak_memory_grows_with_what_is_used(self):
        before = throughput.peak_memory_bytes()
        assert before > 50e6  # torch alone is more
        size = before + 50_000_000
        block = torch.ones(size, dtype=torch.uint8)
        assert throughput.peak_memory_bytes() > before + 40_000_000
        assert block[0] == 1


class TestEnvironment:
    def test_is_json_and_complete(self):
        found = describe()
        assert json.loads(json.dumps(found)) == found
        assert found["torch"] == torch.__version__
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found["threads"] == torch.get_num_threads()
        assert found["cpu"]
        assert found["memory_bytes"] is None or found["memory_bytes"] > 1e8

    def test_names_nobody(self):
        text = json.dumps(describe())
        assert socket.gethostname() not in text
        assert str(Path.home()) not in text
        assert "/" not in describe()["cpu"]
        if len(getpass.getuser()) > 4:  # short names occur inside other words
            assert getpass.getuser() not in text


class TestCompiler:
    def test_says_why(self):
        works, why = compiler.can_compile("cpu")
        assert isinstance(works, bool)
        assert why
        assert "\n" not in why
        assert compiler.can_compile(CPU) == (works, why)

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
        works, why = compiler.can_compile("cpu")
        assert not works
        assert "no C++ compiler found" in why

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("echo 'x.cpp:1: fatal error: Python.h: No such file' >&2; exit 1", "headers are missing"),
            ("echo 'error: out of luck' >&2; exit 1", "does not work: error: out of luck"),
            ("exit 0", "works"),
        ],
    )
    def test_what_the_compiler_says_counts(self, monkeypatch, tmp_path, script, message):
        fake = tmp_path / "fake-c++"
        fake.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CXX", str(fake))
        works, why = compiler.can_compile("cpu")
        assert message in why
        assert works == (message == "works")

    def test_gpu_without_triton_or_cuda(self, monkeypatch):
        monkeypatch.setenv("CC", "test-gpu")  # part of what the answer is remembered by
        monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
        assert compiler.can_compile("cuda") == (
            False,
            "triton is not installed; install it, or train with compile=off",
        )


class TestWorldOfOne:
    def test_init_does_nothing(self, alone):
        world = distributed.init("cpu")
        assert world == distributed.World(rank=0, size=1, device=CPU, local_rank=0)
        assert not torch.distributed.is_initialized()
        distributed.barrier()
        distributed.shutdown()

    def test_torchrun_with_one_process_does_nothing_either(self, alone):
        alone.setenv("RANK", "0")
        alone.setenv("WORLD_SIZE", "1")
        assert distributed.init("cpu").size == 1
        assert not torch.distributed.is_initialized()

    @pytest.mark.parametrize(
        ("env", "message"),
        [
            ({"RANK": "0"}, "WORLD_SIZE is not set; start with torchrun"),
            ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a' and WORLD_SIZE='2' must be whole numbers"),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but must be from 0 to WORLD_SIZE - 1 = 1"),
        ],
    )
    def test_half_a_world(self, alone, env, message):
        for name, value in env.items():
            alone.setenv(name, value)
        with pytest.raises(UserError, match=message):
            distributed.init("cpu")

    def test_device(self, alone):
        with pytest.raises(UserError, match="device is 'tpu'"):
            distributed.init("tpu")
        alone.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="no CUDA device is available"):
            distributed.init("cuda")
        assert distributed.init("auto").device == CPU

    def test_values_are_their_own_company(self):
        x = torch.tensor([1.0, math.pi])
        assert torch.equal(distributed.mean_over_ranks(x), x)
        assert distributed.all_agree(5)
        assert distributed.gather("x") == ["x"]
        assert distributed.broadcast("x") == "x"
        assert (distributed.rank(), distributed.size()) == (0, 1)

    def test_sharding_leaves_the_model_alone(self):
        model = nn.Sequential(nn.Linear(2, 2))
        world = distributed.World(0, 1, CPU, 0)
        weight = model[0].weight
        assert sharding.shard(model, [model[0]], world, torch.bfloat16) is model
        assert model[0].weight is weight
