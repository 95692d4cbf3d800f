//! A locale that is not installed, built into a private directory and used by a real `initdb` and server.

mod cluster;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use cluster::full_server;
use pgthaw_postgres::locale::{Installed, LocaleBuild, Sources};
use pgthaw_postgres::os_user::OsUser;

#[test]
fn a_built_locale_serves_a_cluster() {
    let sources = Sources::here();
    assert!(
        sources.localedef && sources.charsets.contains_key("iso88591"),
        "the sources of locales are installed: {sources:?}"
    );
    assert!(Installed::here().unwrap().contains("C"));
    let user = OsUser::for_postgres(None).unwrap();
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    chown(directory.path(), Some(user.uid), Some(user.gid)).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let build = |name: &str, definition: &str| LocaleBuild {
        name: name.into(),
        definition: definition.into(),
        charset: "ISO-8859-1".into(),
    };
    let locale = build("is_IS.ISO-8859-1", "is_IS");
    let built = locale.build(directory.path(), &user).unwrap();
    assert_eq!(built, directory.path().join("is_IS.iso88591"));
    locale.build(directory.path(), &user).unwrap(); // again

    let mut initdb = std::process::Command::new(full_server().join("initdb"));
    let data = directory.path().join("d");
    initdb
        .args(["-N", "--locale=is_IS.ISO-8859-1", "-D", data.to_str().unwrap()])
        .env("LOCPATH", directory.path())
        .env_remove("LC_ALL");
    user.run_as(&mut initdb);
    let output = initdb.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let error = build("xx_XX.UTF-8", "xx_XX").build(directory.path(), &user).unwrap_err();
    assert!(
        error.to_string().contains("xx_XX.UTF-8") && error.hint().contains("locale-gen"),
        "{error}"
    );
}
