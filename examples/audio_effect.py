"""A neural audio effect, live: an LSTM learns an overdrive, then plays it in blocks of 64 samples.

    python examples/audio_effect.py                       # a plucked string
    python examples/audio_effect.py --wav IN.wav OUT.wav  # your own recording, 16 bit

The network is the one of Wright, Damskägg and Välimäki, "Real-time black-box modelling with
recurrent neural networks" (DAFx 2019): one LSTM over single samples, a linear layer, and the dry
signal added. Printed at the end: the real-time factor, seconds of computing per second of sound
(live use needs it below 1, with room to spare), and the slowest block.
"""

from __future__ import annotations

import argparse
import time
import wave

import numpy as np
import torch
from torch import nn

import fastcell

BLOCK = 64
RATE = 44100


class Amplifier(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = fastcell.LSTM(1, hidden_size, batch_first=True)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, dry: torch.Tensor) -> torch.Tensor:
        return dry + self.out(self.lstm(dry)[0])


class LiveAmplifier:
    """The same network, heard block by block."""

    def __init__(self, model: Amplifier) -> None:
        self.stream = fastcell.Stream([model.lstm, model.out])

    def __call__(self, dry: np.ndarray) -> np.ndarray:
        return dry + self.stream(dry[:, None])[:, 0]


def pluck(seconds: float, rate: int, generator: np.random.Generator) -> np.ndarray:
    """Plucked strings after Karplus and Strong."""
    sound = np.zeros(int(seconds * rate), np.float32)
    for start in range(0, len(sound), rate // 2):
        period = int(rate / generator.choice([82.4, 110.0, 146.8, 196.0, 246.9, 329.6]))
        string = generator.uniform(-0.6, 0.6, period)
        for at in range(start, len(sound), period):
            piece = sound[at : at + period]
            piece += string[: len(piece)].astype(np.float32)
            string = 0.497 * (string + np.roll(string, 1))
    return np.clip(sound, -1, 1)


def overdrive(dry: np.ndarray) -> np.ndarray:
    """What is to be learned: a low-pass filter into an asymmetric tanh."""
    filtered, state = np.empty_like(dry), 0.0
    for i, x in enumerate(dry):
        state += 0.35 * (x - state)
        filtered[i] = state
    return (np.tanh(6 * filtered + 0.4) - np.tanh(0.4)).astype(np.float32) * 0.7


def train(model: Amplifier, dry: np.ndarray, wet: np.ndarray, steps: int) -> float:
    """Truncated backpropagation through random pieces; returns the last error-to-signal ratio."""
    x, y = torch.from_numpy(dry), torch.from_numpy(wet)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(x) - 1024, (32, 1))
        index = starts + torch.arange(1024)
        # The first samples only warm up the state.
        played, aim = model(x[index][..., None])[:, 200:, 0], y[index][:, 200:]
        ratio = (played - aim).square().sum() / aim.square().sum()
        optimizer.zero_grad()
        ratio.backward()
        optimizer.step()
        schedule.step()
    return ratio.item()


def play(effect: LiveAmplifier, dry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sound, and the seconds that each block took."""
    wet, times = np.empty_like(dry), []
    for at in range(0, len(dry), BLOCK):
        block = dry[at : at + BLOCK]
        begin = time.perf_counter()
        wet[at : at + BLOCK] = effect(block)
        times.append(time.perf_counter() - begin)
    return wet, np.array(times)


def read_wav(path: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(path, "rb") as file:
            if file.getsampwidth() != 2:
                raise SystemExit(f"{path}: has {8 * file.getsampwidth()} bits a sample, not 16")
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            mono = sound[:: file.getnchannels()].astype(np.float32) / 32768
            return mono, file.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise SystemExit(f"{path}: cannot be read as a WAV file: {error}") from error


def write_wav(path: str, sound: np.ndarray, rate: int) -> None:
    with wave.open(path, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=40, help="memory cells (40)")
    parser.add_argument("--steps", type=int, default=150, help="of training (150)")
    parser.add_argument("--seconds", type=float, default=5, help="of sound to play (5)")
    parser.add_argument(
        "--wav", nargs=2, metavar=("IN", "OUT"), help="play this 16-bit file instead"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = np.random.default_rng(0)

    sound, rate = (
        read_wav(args.wav[0]) if args.wav else (pluck(args.seconds, RATE, generator), RATE)
    )
    dry = pluck(4, RATE, generator)
    model = Amplifier(args.hidden)
    begin = time.perf_counter()
    error = train(model, dry, overdrive(dry), args.steps)
    print(f"learned the effect in {time.perf_counter() - begin:.1f} s: error to signal {error:.2%}")

    effect = LiveAmplifier(model)
    play(effect, sound[: 100 * BLOCK])  # warm up
    effect.stream.reset()
    wet, times = play(effect, sound)
    with torch.no_grad():
        offline = model(torch.from_numpy(sound)[None, :, None])[0, :, 0].numpy()
    budget = BLOCK / rate
    print(
        f"played {len(sound) / rate:.1f} s in blocks of {BLOCK} samples of {budget * 1e3:.2f} ms\n"
        f"real-time factor {times.sum() / (len(sound) / rate):.4f}, "
        f"median block {np.median(times) * 1e6:.0f} µs, slowest {times.max() * 1e6:.0f} µs\n"
        f"largest difference from the whole at once: {np.abs(wet - offline).max():.1e}"
    )
    if args.wav:
        write_wav(args.wav[1], wet, rate)


if __name__ == "__main__":
    main()
