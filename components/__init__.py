"""What each part of a pipeline takes and gives, family by family. New families and modules go here alone."""
