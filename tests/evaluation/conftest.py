"""What several tests of the evaluation floor share: a protocol and a report."""

import pytest

from evaluation.report import Protocol, Report


@pytest.fixture
def protocol() -> Protocol:
    """A protocol of the tiny recipe."""
    return Protocol(
        recipe="v2_0-tiny",
        prompt_set="walk",
        prompt_digest="0" * 16,
        seeds=(0, 1),
        resolution="96px",
        aspect="16:9",
        frames=17,
        fps=12.0,
        sampling_steps=20,
        guidance_text=3.0,
        guidance_image=3.0,
        oscillate=True,
        loss_timesteps=5,
        loss_clips=16,
        held_out_digest="1" * 16,
        autoencoder_digest="2" * 16,
        text_encoder_digest="3" * 16,
        lpips_digest="4" * 16,
        vbench_version="0.1.5",
        torch_version="2.13.0",
        device="CPU",
    )


@pytest.fixture
def report(protocol: Protocol) -> Report:
    """A report with one loss, a baseline, one dimension with two prompts, and one that is absent."""
    videos = {"0-0.mp4": 0.9, "0-1.mp4": 0.92, "1-0.mp4": 0.8, "1-1.mp4": 0.82}
    metrics = {"loss/held_out": 0.8, "loss/untrained": 1.0, "vbench/temporal_flickering": 0.86}
    absent = {"vbench/scene": "no <weights>"}
    return Report("c" * 16, protocol, metrics, absent, {"vbench/temporal_flickering": videos}, ("a note",))
