"""The arithmetic of docs/scale.md: what 10^6, 10^8 and 10^9 images ask of driver, storage, network and fleet.

Every figure is a formula of the assumptions below, which are printed first; --set NAME=VALUE changes one. Those that
this repository measured say where; the others are published or are assumed, and say so.

    python benchmarks/scale_plan.py --set shard_size=256
"""

import argparse
from dataclasses import dataclass, fields, replace
from typing import Annotated, get_type_hints


@dataclass(frozen=True)
class Assumptions:
    """What the table is computed from."""

    num_gpus: Annotated[float, "assumed; one actor each"] = 1000
    images_per_s: Annotated[float, "per GPU; VILA², published for an H100"] = 10.6
    shard_size: Annotated[float, "images; the default is 256"] = 4096
    image_bytes: Annotated[float, "STIC's 6,099 COCO photographs, published"] = 162_000
    index_bytes: Annotated[float, "per image; measured, shards of 4,096 with addresses of 60 characters"] = 50
    task_bytes: Annotated[float, "of driver memory per shard, our own list; measured"] = 605
    ray_bytes: Annotated[float, "of driver memory per shard, Ray Data's; measured over 4,087 shards"] = 16_000
    driver_cpu_s: Annotated[float, "of driver CPU per shard; measured"] = 0.026
    requests_per_image: Annotated[float, "to the store: size, then content; pyarrow"] = 2
    writes_per_shard: Annotated[float, "note, rejected rows, pairs; the note is deleted, which is free"] = 3
    list_page: Annotated[float, "names per LIST; S3, documented"] = 1000
    list_s: Annotated[float, "per LIST, one after the other; assumed"] = 0.1
    store_latency_s: Annotated[float, "per small read; assumed"] = 0.03
    footer_reads: Annotated[float, "per shard at a restart: size, footer; two families"] = 4
    footer_threads: Annotated[float, "core/rundir.py"] = 16
    scan_cpu_s: Annotated[float, "per photograph: hash, decode, index; assumed from 2.1 ms of decoding"] = 0.005
    near_duplicate_bytes: Annotated[float, "per image in one task; docs/architecture.md"] = 60
    spot_hours: Annotated[float, "between two losses of one spot machine; assumed"] = 24
    hardware_hours: Annotated[float, "of one GPU between failures; Llama 3: 16,384 GPUs, 54 days, 419"] = 50_700
    restart_s: Annotated[float, "until an actor works again: machine there, 15 GB of weights to read"] = 120
    pair_tokens: Annotated[float, "image, prompt, two answers (LLaVA-1.6)"] = 2750
    training_flops: Annotated[float, "per GPU and second: 0.4 of an H100's 989e12"] = 396e12
    parameters: Annotated[float, "of the model"] = 7e9
    save_every_s: Annotated[float, "between two training checkpoints; 200 steps of 3 s"] = 600


def figures(num_images: float, a: Assumptions) -> dict[str, str]:
    """Return the rows of the table for a pool of so many images."""
    fleet = a.num_gpus * a.images_per_s
    shards = num_images / a.shard_size
    hours = num_images / fleet / 3600
    shard_s = a.shard_size / a.images_per_s
    lost_s = shard_s + a.restart_s  # half of each of the two shards that an actor holds, and the start of another actor
    spot_s = a.spot_hours * 3600 / a.num_gpus
    hardware_s = a.hardware_hours * 3600 / a.num_gpus
    training_h = 8 * a.parameters * a.pair_tokens * num_images / (a.num_gpus * a.training_flops) / 3600
    return {
        "generation, hours": f"{hours:,.2f}",
        "index, GB": f"{num_images * a.index_bytes / 1e9:,.2f}",
        "pairs with their images, TB": f"{num_images * a.image_bytes / 1e12:,.1f}",
        "shards": f"{shards:,.0f}",
        "shards a second": f"{fleet / a.shard_size:,.1f}",
        "driver's cores busy": f"{fleet / a.shard_size * a.driver_cpu_s:,.2f}",
        "driver's memory for shards, GB": f"{shards * (a.task_bytes + a.ray_bytes) / 1e9:,.2f}",
        "images read, requests a second": f"{fleet * a.requests_per_image:,.0f}",
        "shards written, requests a second": f"{fleet / a.shard_size * a.writes_per_shard:,.1f}",
        "network from the store, Gbit/s": f"{fleet * a.image_bytes * 8 / 1e9:,.1f}",
        "network to the store, Gbit/s": f"{fleet * a.image_bytes * 8 / 1e9:,.1f}",
        "the same per machine, Mbit/s": f"{2 * a.images_per_s * a.image_bytes * 8 / 1e6:,.0f}",
        "listing a bucket of single files, hours": f"{num_images / a.list_page * a.list_s / 3600:,.2f}",
        "indexing, CPU-hours": f"{num_images * a.scan_cpu_s / 3600:,.0f}",
        "near-duplicates, GB in one task": f"{num_images * a.near_duplicate_bytes / 1e9:,.2f}",
        "resuming: footers of all shards, minutes": (
            f"{shards * a.footer_reads * a.store_latency_s / a.footer_threads / 60:,.1f}"
        ),
        "spot: seconds between two losses": f"{spot_s:,.0f}",
        "spot: GPU-seconds lost each time": f"{lost_s:,.0f}",
        "spot: share of the work": f"{lost_s / (a.spot_hours * 3600):.2%}",
        "spot: losses in the whole run": f"{hours * 3600 / spot_s:,.0f}",
        "hardware: hours between two failures": f"{hardware_s / 3600:,.1f}",
        "training on all pairs once, hours": f"{training_h:,.2f}",
        "training: share lost to hardware": f"{(a.save_every_s / 2 + a.restart_s) / hardware_s:.2%}",
    }


def main() -> None:
    """Print assumptions and table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    changes = {name: float(value) for name, value in (each.split("=", 1) for each in parser.parse_args().set)}
    assumptions = replace(Assumptions(), **changes)
    hints = get_type_hints(Assumptions, include_extras=True)
    print("| assumption | value | from |\n|---|---|---|")
    for field in fields(Assumptions):
        print(f"| `{field.name}` | {getattr(assumptions, field.name):,g} | {hints[field.name].__metadata__[0]} |")
    sizes = (1e6, 1e8, 1e9)
    tables = [figures(size, assumptions) for size in sizes]
    print("\n| | 10^6 | 10^8 | 10^9 |\n|---|---|---|---|")
    for name in tables[0]:
        print(f"| {name} | {' | '.join(table[name] for table in tables)} |")


if __name__ == "__main__":
    main()
