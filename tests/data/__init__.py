"""What `toast.data` holds for pictures and text alike."""
