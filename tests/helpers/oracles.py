"""The formulas of the method as plain loops in float64, without torch."""

import math


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def soften(logits, labels, temperature):
    return [
        softmax([value / temperature[label] for value in row])
        for row, label in zip(logits, labels, strict=True)
    ]


def log_softmax(row):
    top = max(row)
    rest = math.log(sum(math.exp(value - top) for value in row))
    return [value - top - rest for value in row]


def soft_label_kl(logits, soft_labels):
    total = 0.0
    for row, label in zip(logits, soft_labels, strict=True):
        for log_q, p in zip(log_softmax(row), label, strict=True):
            if p > 0:
                total += p * (math.log(p) - log_q)
    return total / len(logits)


def class_risk_sums(logits, labels, num_classes):
    sums, counts = [0.0] * num_classes, [0] * num_classes
    for row, label in zip(logits, labels, strict=True):
        sums[label] -= log_softmax(row)[label]
        counts[label] += 1
    return sums, counts


def update_temperature(temperature, class_risk, rate, lower, upper, move="absolute"):
    """class_risk: None for a class without images."""
    present = [risk for risk in class_risk if risk is not None]
    if not present or not all(map(math.isfinite, present)):
        return list(temperature)
    mean = math.fsum(present) / len(present)
    gaps = [0.0 if risk is None else risk - mean for risk in class_risk]
    largest = max(map(abs, gaps))
    if largest <= len(present) * 2.0**-52 * max(map(abs, present)):
        return list(temperature)
    moved = [
        old * math.exp(-rate * gap / largest) if move == "relative" else old - rate * gap / largest
        for old, gap in zip(temperature, gaps, strict=True)
    ]
    return [min(max(value, lower), upper) for value in moved]


def project(x_adv, x_nat, epsilon):
    """Project one pixel."""
    return min(max(min(max(x_adv, x_nat - epsilon), x_nat + epsilon), 0.0), 1.0)


def fairness(class_accuracy, ddof=0):
    count = len(class_accuracy)
    mean = sum(class_accuracy) / count
    variance = sum((value - mean) ** 2 for value in class_accuracy) / (count - ddof)
    return mean, min(class_accuracy), math.sqrt(variance) / mean if mean else 0.0


def worst_tenth(class_accuracy):
    worst = sorted(class_accuracy)[: max(1, len(class_accuracy) // 10)]
    return sum(worst) / len(worst)


def margin(logits, labels, confidence):
    """Over the batch, the sum of the best wrong logit minus the true one, capped."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        best = max(value for k, value in enumerate(row) if k != label)
        total += min(best - row[label], confidence)
    return total


def metrics(class_accuracy):
    mean, worst, nsd = fairness(class_accuracy)
    return {
        "average": mean,
        "worst": worst,
        "worst_tenth": worst_tenth(class_accuracy),
        "gap": max(class_accuracy) - worst,
        "normalized_std": nsd,
    }


def wilson(right, images, z):
    """The roots of (p - share)^2 = z^2 p (1-p) / images."""
    share, spread = right / images, z * z / images
    a, b, c = 1 + spread, -2 * share - spread, share * share
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def evaluation(labels, clean, attacks, each):
    """Return the predictions after the clean images and each attack, and, for each attack, the
    pairs (restart, image) that were attacked.

    attacks: for each attack, for every restart, the prediction for every image once attacked.
    """
    rows, attacked = [list(clean)], []
    for tries in attacks:
        earlier, row, pairs = rows[0 if each else -1], [], set()
        for image, label in enumerate(labels):
            predicted = earlier[image]
            if predicted == label:
                for restart, turned in enumerate(tries):
                    pairs.add((restart, image))
                    predicted = turned[image]
                    if predicted != label:
                        break
            row.append(predicted)
        rows.append(row)
        attacked.append(pairs)
    return rows, attacked


def confusion(labels, rows, num_classes):
    """Count true class by first wrong prediction, or the true class."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for image, label in enumerate(labels):
        wrong = [row[image] for row in rows if row[image] != label]
        counts[label][(wrong or [label])[0]] += 1
    return counts


def project_l2(x_adv, x_nat, epsilon):
    """Project one image, a list of pixels."""
    distance = math.hypot(*(a - n for a, n in zip(x_adv, x_nat, strict=True)))
    share = min(1.0, epsilon / distance) if distance else 1.0
    moved = (n + share * (a - n) for a, n in zip(x_adv, x_nat, strict=True))
    return [min(max(pixel, 0.0), 1.0) for pixel in moved]
