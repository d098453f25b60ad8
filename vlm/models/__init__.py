"""Whole models: image encoder + bridge (+ language model), with the task methods users call."""
