"""What is trained between the frozen parts: dual tower, Q-Former, projection."""
