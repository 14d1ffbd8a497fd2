"""What differs between images and text."""
