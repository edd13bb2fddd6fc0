"""Random states of Python, NumPy and PyTorch: seed, save, restore, and seed for a moment."""

import contextlib
import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator of this process."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_random_state(device: torch.device) -> dict:
    """State of every generator, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict) -> None:
    """Restore what get_random_state returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def mix_seeds(*key: int) -> int:
    """A seed of 32 bits from several numbers >= 0; keys that differ in one number share nothing."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*key: int):
    """Seed every CPU generator from `key`; the previous states come back at the end.

    Called once per image, so it keeps the states as they are instead of converting them.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mix_seeds(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
