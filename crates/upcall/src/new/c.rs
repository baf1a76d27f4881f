//! The project of a filter in C: one source, one header, a Makefile.

use super::{File, fill};

/// All files of the project.
pub fn files(name: &str) -> Vec<File> {
    let filled = |template| fill(template, name);
    vec![
        (filled("@NAME@.c"), filled(include_str!("templates/c/filter.c"))),
        (filled("test.c"), filled(include_str!("templates/c/test.c"))),
        ("Makefile".into(), filled(include_str!("templates/c/Makefile"))),
        ("README.md".into(), filled(include_str!("templates/c/README.md"))),
        (".gitignore".into(), "*.so\n/test\n".into()),
        (
            "include/upcall/filter.h".into(),
            include_str!("../../../../sdk/c/include/upcall/filter.h").into(),
        ),
    ]
}

/// Where the build puts the filter.
pub fn built(name: &str) -> String {
    format!("./{name}.so")
}
