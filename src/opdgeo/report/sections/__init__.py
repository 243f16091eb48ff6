"""The sections of the page, a file each: what a section needs from the data files, and the template beside it that shows it."""
