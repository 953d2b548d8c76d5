"""The published networks of absld.models.published: the command that lists them, and the page."""

import json
import re
from pathlib import Path

import pytest
from helpers.program import main, refused

import absld
from absld.config.files import HUB
from absld.models.hub import parse
from absld.models.published import PUBLISHED

PAGE = Path(absld.__file__).parents[1] / "docs/teachers.md"


def row(network):
    """A network as a row of the table in the page."""
    accuracies = "not known"
    if network.clean is not None:
        accuracies = f"{network.clean:.2f} / {network.robust:.2f}"
    kind = "folder" if "/folders/" in network.where else "file"
    where = f"[{kind}]({network.where})"
    if network.where.startswith(HUB):
        where = f"`{network.where}`"
    paper = f"[{network.arxiv}](https://arxiv.org/abs/{network.arxiv})"
    budget = f"{network.norm} {network.epsilon}"
    cells = (network.name, f"`{network.architecture}`", network.dataset, budget, accuracies, paper)
    return "| " + " | ".join([*cells, network.pixels, where, network.sha256 or "not known"]) + " |"


def test_the_page_has_the_table_of_the_package():
    rows = [
        line for line in PAGE.read_text().splitlines() if "arxiv.org/abs" in line and "|" in line
    ]
    assert rows == [row(network) for network in PUBLISHED]


@pytest.mark.parametrize("network", PUBLISHED, ids=lambda n: f"{n.dataset}-{n.norm}-{n.name}")
def test_a_row_is_well_formed(network):
    assert re.fullmatch(r"\d{4}\.\d{5}", network.arxiv)
    assert network.norm in ("linf", "l2") and re.fullmatch(r"8/255|0\.\d+", network.epsilon)
    assert network.sha256 is None or re.fullmatch("[0-9a-f]{64}", network.sha256)
    assert network.clean is None or 0 < network.robust < network.clean < 100
    assert re.fullmatch(r"(dm-)?wrn-\d+-\d+|(dm-preact)?resnet18", network.architecture)
    if network.where.startswith(HUB):
        assert parse(network.where).file
    else:
        assert re.fullmatch(r"https://(drive|storage)\.google(apis)?\.com/[\w/.-]+", network.where)


def test_no_network_stands_twice():
    assert len({network[:4] for network in PUBLISHED}) == len({n.where for n in PUBLISHED})
    assert len({network.where for network in PUBLISHED}) == len(PUBLISHED)


def test_they_are_listed_in_80_columns_but_for_addresses(capfd):
    assert main("teacher", "list") == 0
    lines = capfd.readouterr().out.splitlines()
    addresses = [network.where for network in PUBLISHED]
    assert [line.strip() for line in lines if line.strip() in addresses] == addresses
    assert all(len(line) <= 80 for line in lines if line.strip() not in addresses)


def test_those_of_a_data_set_are_listed_as_a_document(capfd):
    assert main("teacher", "list", "--dataset", "cifar100", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    of_data = [network for network in PUBLISHED if network.dataset == "cifar100"]
    assert document["schema"] == "absld-published-1"
    assert [tuple(n.values())[:-1] for n in document["networks"]] == [tuple(n) for n in of_data]


def test_a_data_set_without_any_is_an_error_that_names_the_others(capfd):
    refused(capfd, 2, "'digits'", "cifar10, cifar100", "teacher", "list", "--dataset", "digits")
