"""From YAML files and dotted options to objects: the part of the command line that knows jsonargparse.

    problems    what is wrong, where it was written, what to write instead
    document    YAML files as trees whose nodes know where they were written
    signatures  what jsonargparse knows of a class: its arguments, their types, the classes that fit a slot
    parser      the jsonargparse parser of a command: the only place that says which keys there are
    tree        all files and options of a command as one tree
    explain     why the parser refused: every problem, with its place
    manual      the pages behind --KEY.help
    build       the Trainer, the module, the data and the optimizer that a config describes
    record      the resolved config, written into the run directory and told to the loggers

jsonargparse alone parses, validates and instantiates; the rest only says where and why.
"""
