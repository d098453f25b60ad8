"""What a run costs, known beforehand: parameters, operations, memory, time."""
