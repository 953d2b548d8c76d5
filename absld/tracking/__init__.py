"""Trackers: trainings and evaluations in TensorBoard, MLflow, W&B and trackio."""
