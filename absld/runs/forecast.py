"""The forecast of a comparison or sweep, said before the first training starts."""

from collections.abc import Sequence

from absld.runs.jobs import Job
from absld.text import time_text


def forecast(
    jobs: Sequence[Job], students: int, at_a_time: int | None, measured: float | None = None
) -> str:
    """Describe the trainings to come in a line, with their time if it is known.

    Args:
        jobs: those of the teachers, then those of the students.
        at_a_time: number of jobs at a time; None if it is not known.
        measured: seconds of all by a few steps of each; None if they were not measured.
    """
    finished = [job for job in jobs if job.run.exists() and job.run.status() == "finished"]
    teachers = len(jobs) - students
    text = f"{students} trainings" + (f" and {teachers} of teachers" if teachers else "")
    if finished:
        text += f", {len(finished)} of them finished"
    if len(finished) == len(jobs):
        return text
    seconds = [record.get("seconds", 0.0) for job in finished for record in job.run.records()]
    if not seconds and measured and at_a_time:
        return f"{text}; about {time_text(measured / at_a_time)} by a few steps of each"
    if not seconds:
        return f"{text}; their time can be estimated after the first one, or by --estimate"
    epochs = sum(job.epochs for job in jobs if job not in finished)
    rest = sum(seconds) / len(seconds) * epochs
    if at_a_time is None:
        return f"{text}; about {time_text(rest)} of computing left, by those"
    return f"{text}; about {time_text(rest / at_a_time)} left, by those"
