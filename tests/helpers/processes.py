"""Child processes, forked off a server that has imported what they need, once for all tests."""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "absld.runs.training_run",
        "absld.cli.training_view",
        "torchvision.datasets",
        "sklearn.model_selection",
        "helpers.program",
        "pydantic.type_adapter",  # which typer imports where it is installed
    ]
)
