"""Published robust networks whose files fit: where they are, and what is known of them.

Names, architectures, budgets, papers, and accuracies clean and under AutoAttack: RobustBench
(arXiv 2010.09670); of ABSLD's students: their authors' page. Places: the authors' pages where they
link a file, else RobustBench's list of models.
"""

from typing import NamedTuple

from absld.errors import UsageError

PREFIX = "published:"
PLACES = {
    "drive": "https://drive.google.com/file/d/{name}/view",
    "folder": "https://drive.google.com/drive/folders/{name}",
    "deepmind": "https://storage.googleapis.com/dm-adversarial-robustness/"
    "{dataset}_{norm}_{name}.pt",
    "wang": "hf:wzekai99/DM-Improves-AT/checkpoint/{dataset}_{norm}_{name}.pt",
}
# Under each data set and budget: name, architecture, paper, accuracies in per cent, place, and the
# SHA-256 of the file where it is known.
TABLE = """\
# cifar10 linf 0.031
Zhang2019Theoretically       wrn-34-10     1901.08573 84.92 53.08 drive:10sHvaXhTNZGz618QmD5gSOAjO3rMzV33
# cifar10 linf 8/255
Carmon2019Unlabeled          wrn-28-10     1905.13736 89.69 59.53 drive:15tUx-gkZMYx7BfEOw1GY5OKC-jECIsPQ
Wu2020Adversarial            wrn-34-10     2004.05884 85.36 56.17 drive:13LBcgNvhFppCFG22i1xATrahFPfMgXGf
Wu2020Adversarial_extra      wrn-28-10     2004.05884 88.25 60.04 drive:1-WJWpAZLlmc4gJ8XXNf7IETjnSZzaCNp
Gowal2020Uncovering_34_20    dm-wrn-34-20  2010.03593 85.64 56.82 deepmind:wrn34-20_without
Gowal2020Uncovering_28_10_extra dm-wrn-28-10  2010.03593 89.48 62.76 deepmind:wrn28-10_with
Rebuffi2021Fixing_28_10_cutmix_ddpm dm-wrn-28-10  2103.01946 87.33 60.75 deepmind:wrn28-10_cutmix_ddpm_v2
Rebuffi2021Fixing_R18_ddpm   dm-preactresnet18 2103.01946 83.53 56.66 drive:1--dxE66AsgBSUsuK2sXCTrsYUV9B5f95
Sehwag2021Proxy              wrn-34-10     2104.09425 85.85 59.09 drive:1QFA5fPMj2Qw4aYNG33PkFqiv_RTDWvzm
Sehwag2021Proxy_R18          resnet18      2104.09425 84.38 54.43 drive:1-ZgoSlD_AMhtXdnUElilxVXnzK2DcHuu
Chen2021LTD_WRN34_20         wrn-34-20     2111.02331 86.03 57.71 drive:1-5JmY9rapuGwCUc2nPvy7Rb_sn_dHhFm
Pang2022Robustness_WRN28_10  dm-wrn-28-10  2202.10103 88.61 61.04 drive:16ChNkterCp17BXv-xxqpfedb4u2_CjjS
Addepalli2022Efficient_RN18  resnet18      2210.15318 85.71 52.48 drive:1m5vhdzIUUKhDbsZdOG9z76Eyp6f4xe_f
Addepalli2022Efficient_WRN_34_10 wrn-34-10     2210.15318 88.71 57.81 drive:1--dVDtZhAk4D2zMtTDwIGnImuCGxTcBA
Wang2023Better_WRN-28-10     dm-wrn-28-10  2302.04638 92.44 67.31 wang:wrn28-10
Wang2023Better_WRN-70-16     dm-wrn-70-16  2302.04638 93.25 70.69 wang:wrn70-16
Bartoldson2024Adversarial_WRN-82-8 dm-wrn-82-8   2404.09349 93.11 71.59 drive:1--jl8qJh624SFqFffvg1IkYR-fZGA2Sr
ABSLD-students               resnet18      2312.05508     -     - folder:1-rz49FBrYw6RldaRxB3yvrR8cd4liVZG
# cifar10 l2 0.5
Wang2023Better_WRN-28-10     dm-wrn-28-10  2302.04638 95.16 83.68 wang:wrn28-10
# cifar100 linf 8/255
Gowal2020Uncovering          dm-wrn-70-16  2010.03593 60.86 30.03 deepmind:wrn70-16_without
Gowal2020Uncovering_extra    dm-wrn-70-16  2010.03593 69.15 36.88 deepmind:wrn70-16_with
Rebuffi2021Fixing_28_10_cutmix_ddpm dm-wrn-28-10  2103.01946 62.41 32.06 deepmind:wrn28-10_cutmix_ddpm
Rebuffi2021Fixing_70_16_cutmix_ddpm dm-wrn-70-16  2103.01946 63.56 34.64 deepmind:wrn70-16_cutmix_ddpm
Rebuffi2021Fixing_R18_ddpm   dm-preactresnet18 2103.01946 56.87 28.50 drive:1-Qcph_EXw1SCYhDIl8cwqTQQy0sJKO8N
Chen2021LTD_WRN34_10         wrn-34-10     2111.02331 64.07 30.59 drive:1-I4NZyULdEWH46b4EaCTxuuRo4eFXsg_
Pang2022Robustness_WRN28_10  dm-wrn-28-10  2202.10103 63.66 31.08 drive:1VDDM_j5M4b6sZpt1Nnhkr8FER3kjE33M
Addepalli2022Efficient_RN18  resnet18      2210.15318 65.45 27.67 drive:1-2hnxC7lZOQDqQbum4yPbtRtTND86I5N
Wang2023Better_WRN-28-10     dm-wrn-28-10  2302.04638 72.58 38.83 wang:wrn28-10
Wang2023Better_WRN-70-16     dm-wrn-70-16  2302.04638 75.22 42.67 wang:wrn70-16
"""


class Published(NamedTuple):
    """A published network.

    epsilon: budget of its evaluation, for pixels in [0,1]. architecture: in the terms of this
    package. arxiv: of the paper. clean, robust: accuracies on all test images in per cent, the
    latter under AutoAttack; None where they are not known. where: a URL, or the hf: name to type.
    sha256: of the file; None where it is not known.
    """

    dataset: str
    norm: str
    epsilon: str
    name: str
    architecture: str
    arxiv: str
    clean: float | None
    robust: float | None
    where: str
    sha256: str | None = None

    @property
    def pixels(self) -> str:
        """The scale of pixels that it takes. DeepMind's networks normalise them inside."""
        return "[0,1], normalised inside" if self.architecture.startswith("dm-") else "[0,1]"


def parse_table(table: str) -> tuple[Published, ...]:
    """Return the rows of a table."""
    rows = []
    dataset = norm = epsilon = ""
    for line in table.splitlines():
        first, *others = line.split()
        if first == "#":
            dataset, norm, epsilon = others
            continue
        architecture, arxiv, clean, robust, place, *sha256 = others
        kind, _, file = place.partition(":")
        rows.append(
            Published(
                dataset,
                norm,
                epsilon,
                name=first,
                architecture=architecture,
                arxiv=arxiv,
                clean=None if clean == "-" else float(clean),
                robust=None if robust == "-" else float(robust),
                where=PLACES[kind].format(dataset=dataset, norm=norm, name=file),
                sha256=sha256[0] if sha256 else None,
            )
        )
    return tuple(rows)


PUBLISHED = parse_table(TABLE)


def refuse_published(teacher: str, dataset: str) -> None:
    """Raise UsageError, with the place to fetch it from, if a teacher is `published:NAME`."""
    if not teacher.startswith(PREFIX):
        return
    name = teacher.removeprefix(PREFIX)
    where = [row.where for row in PUBLISHED if (row.name, row.dataset) == (name, dataset)]
    if not where:
        raise UsageError(
            f"no published teacher of {dataset} has the name {name!r}",
            f"absld teacher list --dataset {dataset} has their names",
        )
    is_typed = where[0].startswith("hf:")
    raise UsageError(
        f"the teacher {name} is published, and has to be given",
        f"--teacher {where[0]}"
        if is_typed
        else f"fetch {where[0]} and give --teacher FILE; --teacher '' trains one instead",
    )
