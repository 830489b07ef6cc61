//! Random trees on three levels. Local and remote stem from the base by a few edits each,
//! as they do in life.

use proptest::prelude::*;

use super::properties::all_hold;
use super::*;

#[derive(Clone, Debug)]
enum Edit {
    Put(usize, Entry),
    Remove(usize),
    Mode(usize, u32),
    Attribute(usize, u8),
    Touch(usize, i64),
}

const PLACES: [&str; 12] = [
    "a", "b", "a/x", "a/y", "b/x", "b/y", "a/x/p", "a/x/q", "a/y/p", "b/x/p", "b/y/p", "a-b",
];

fn place(number: usize) -> RelPath {
    RelPath::new(PLACES[number]).unwrap()
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        4 => prop::sample::select(vec!["a", "bb", "ccc", "dddd"]).prop_map(file),
        4 => Just(directory()),
        1 => prop::sample::select(vec!["t", "u"]).prop_map(symlink),
    ]
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let at = || 0..PLACES.len();
    let edit = prop_oneof![
        6 => (at(), entry()).prop_map(|(at, entry)| Edit::Put(at, entry)),
        3 => at().prop_map(Edit::Remove),
        1 => (at(), prop::sample::select(vec![0o600, 0o755]))
            .prop_map(|(at, mode)| Edit::Mode(at, mode)),
        1 => (at(), 0..3_u8).prop_map(|(at, value)| Edit::Attribute(at, value)),
        1 => (at(), 0..3_i64).prop_map(|(at, secs)| Edit::Touch(at, secs)),
    ];
    prop::collection::vec(edit, 0..most)
}

fn edit(tree: &mut Tree, edit: &Edit) {
    let (Edit::Put(at, _)
    | Edit::Remove(at)
    | Edit::Mode(at, _)
    | Edit::Attribute(at, _)
    | Edit::Touch(at, _)) = edit;
    let at = place(*at);
    match edit {
        Edit::Put(_, entry) => {
            let parent = at.parent().unwrap();
            let fits = parent.is_root()
                || tree
                    .get(&parent)
                    .is_some_and(|entry| entry.content == Content::Directory);
            if fits {
                let stays = tree.get(&at).is_some_and(|there| {
                    there.content == Content::Directory && entry.content == Content::Directory
                });
                if !stays {
                    tree.retain(|path, _| !path.starts_with(&at));
                    tree.insert(at, entry.clone());
                }
            }
        }
        Edit::Remove(_) => tree.retain(|path, _| !path.starts_with(&at)),
        Edit::Mode(_, mode) => {
            if let Some(entry) = tree.get_mut(&at)
                && !matches!(entry.content, Content::Symlink { .. })
            {
                entry.mode = *mode;
            }
        }
        Edit::Attribute(_, value) => {
            if let Some(entry) = tree.get_mut(&at)
                && !matches!(entry.content, Content::Symlink { .. })
            {
                entry.xattrs.insert(b"user.k".to_vec(), vec![*value]);
            }
        }
        Edit::Touch(_, secs) => {
            if let Some(entry) = tree.get_mut(&at)
                && matches!(entry.content, Content::File { .. })
            {
                entry.mtime.secs = *secs;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn all_properties_hold_for_random_trees(
        made in edits(24),
        here in edits(8),
        there in edits(8),
        same in edits(3),
    ) {
        let mut base = Tree::new();
        made.iter().for_each(|step| edit(&mut base, step));
        let (mut local, mut remote) = (base.clone(), base.clone());
        here.iter().chain(&same).for_each(|step| edit(&mut local, step));
        there.iter().chain(&same).for_each(|step| edit(&mut remote, step));
        all_hold(&base, &local, &remote);
        // First contact: no base at all.
        all_hold(&Tree::new(), &local, &remote);
    }
}
