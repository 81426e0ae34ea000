"""Names as torch and Ray give them."""

import pytest

from stic_ray.core.devices import find_device


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("A100-80G", "A100 80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_the_names_that_torch_and_ray_give_it(name: str, device: str | None) -> None:
    found = find_device(name)
    assert (found and found.name) == device


def test_figures_are_those_of_the_data_sheets() -> None:
    found = find_device("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert (found.peak_flops, found.memory_bandwidth_gb_s, found.memory_gib) == (989e12, 3350, 79)
