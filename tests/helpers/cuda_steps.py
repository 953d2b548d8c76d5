"""Training steps on a CUDA device, each with the record of what it made the device do."""

import contextlib

from helpers.cuda_device import Record

# Settings with which a CPU computes what an engine computes on the pretend device.
AS_ON_CUDA = {
    "plain": {},
    "auto": {"channels_last": True},
    "fast": {"channels_last": True, "fold_batch_norm": True},
}


class StepRecords(list[Record]):
    """The records of the steps of a training, to which it is given as `on_step`.

    The first step of an epoch is left out: it has work that others have not, such as a capture.
    """

    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.current = cuda, contextlib.ExitStack()

    def __call__(self, report):
        self.current.close()
        if report.phase == "training" and report.done < report.total:
            self.append(self.current.enter_context(self.cuda.step()))

    def of_batches(self, batches):
        """Return the generator `absld_min.batches`, which records the steps between its batches."""

        def recorded(*args):
            for number, batch in enumerate(batches(*args)):
                self.current.close()
                if number:
                    self.append(self.current.enter_context(self.cuda.step()))
                yield batch
            self.current.close()

        return recorded


def assert_clean(records, waits):
    """Assert that steps wait so often at most, and that nothing else is amiss in them."""
    assert records
    for record in records:
        assert len(record.waits) <= waits, record.waits
        assert not record.cpu_indices and not record.global_draws and not record.unrepeatable
