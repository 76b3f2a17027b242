//! Names in directories: LOOKUP, and everything that makes, moves or removes one.

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, mkdirat, mknodat, openat, readlinkat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::host::{self, FileId, Found};
use crate::nodes::Place;
use crate::wire::Name;
use crate::{Call, Share};

/// What a guest may ask of a rename; the third that there is makes devices.
const RENAMES: RenameFlags = RenameFlags::NOREPLACE.union(RenameFlags::EXCHANGE);

impl Share {
    pub(crate) fn look_up(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let name = call.args.name()?;
        let (node, stat) = self.find(call.header.node, name)?;
        self.put_entry(call.reply, node, &stat);
        Ok(())
    }

    /// Finds a directory's entry and counts a look-up.
    pub(crate) fn find(
        &self,
        parent: u64,
        name: Name<'_>,
    ) -> Result<(u64, rustix::fs::Statx), Errno> {
        let directory = self.directory(parent)?;
        if !self.is_visible(parent, name) {
            return Err(Errno::NOENT);
        }
        // Most are known: then there is nothing to open.
        let stat = host::stat_at(&directory, name)?;
        let place = Place {
            parent,
            name: name.as_c_str().to_owned(),
        };
        if let Some(node) = self.nodes.lock().look_up(&FileId::of(&stat), &place) {
            return Ok((node, stat));
        }
        let (found, stat) = self.spare(|| host::find(&directory, name))?;
        let node = self.nodes.lock().enter(found, place)?;
        Ok((node, stat))
    }

    /// Gives a new entry its owner and mode, and tells of it. One that can't be given is removed.
    fn finish_entry(
        &self,
        call: &mut Call<'_>,
        directory: impl AsFd,
        name: Name<'_>,
        mode: u32,
        remove: AtFlags,
    ) -> Result<(), Errno> {
        let directory = directory.as_fd();
        let made = self
            .spare(|| host::find(directory, name))
            .and_then(|(found, _)| {
                self.finish(call, directory, &found.fd, mode)?;
                Ok(found)
            });
        let Found { fd, kind, id } = made.inspect_err(|_| {
            let _ = unlinkat(directory, name.as_c_str(), remove);
        })?;
        let stat = host::stat(&fd)?;
        let node = self.enter(call.header.node, Found { fd, kind, id }, name)?;
        self.put_entry(call.reply, node, &stat);
        Ok(())
    }

    pub(crate) fn read_link(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        let (fd, kind) = self.node(call.header.node)?;
        if kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = readlinkat(&fd, c"", Vec::new())?;
        call.reply.extend_from_slice(target.as_bytes());
        Ok(())
    }

    pub(crate) fn symlink(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let name = call.args.name()?;
        let target = call.args.string()?;
        let directory = self.directory(call.header.node)?;
        symlinkat(target, &directory, name.as_c_str())?;
        self.finish_entry(call, &directory, name, 0, AtFlags::empty())
    }

    pub(crate) fn make_node(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let (mode, _device, _umask) = (call.args.u32()?, call.args.u32()?, call.args.u32()?);
        call.args.skip(4)?;
        let name = call.args.name()?;
        let directory = self.directory(call.header.node)?;
        let permissions = Mode::from_raw_mode(mode);
        match FileType::from_raw_mode(mode) {
            FileType::RegularFile => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                self.spare(|| openat(&directory, name.as_c_str(), flags, permissions))?;
            }
            kind @ (FileType::Fifo | FileType::Socket) => {
                mknodat(&directory, name.as_c_str(), kind, permissions, 0)?;
            }
            // A device of the host's is nothing that a guest may make.
            _ => return Err(Errno::PERM),
        }
        self.finish_entry(call, &directory, name, mode & 0o7777, AtFlags::empty())
    }

    pub(crate) fn make_directory(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let (mode, _umask) = (call.args.u32()?, call.args.u32()?);
        let name = call.args.name()?;
        let directory = self.directory(call.header.node)?;
        mkdirat(&directory, name.as_c_str(), Mode::from_raw_mode(mode))?;
        self.finish_entry(call, &directory, name, mode & 0o7777, AtFlags::REMOVEDIR)
    }

    pub(crate) fn unlink(&self, call: &mut Call<'_>, is_directory: bool) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let name = call.args.name()?;
        let directory = self.directory(call.header.node)?;
        let flags = match is_directory {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        unlinkat(&directory, name.as_c_str(), flags)
    }

    pub(crate) fn rename(&self, call: &mut Call<'_>, has_flags: bool) -> Result<(), Errno> {
        let to_parent = call.args.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            flags = RenameFlags::from_bits_retain(call.args.u32()?);
            call.args.skip(4)?;
        }
        if !RENAMES.contains(flags) {
            return Err(Errno::INVAL);
        }
        let from_parent = call.header.node;
        self.must_be_changeable(from_parent)?;
        self.must_be_changeable(to_parent)?;
        let (from_name, to_name) = (call.args.name()?, call.args.name()?);
        let (from, to) = (self.directory(from_parent)?, self.directory(to_parent)?);
        renameat_with(&from, from_name.as_c_str(), &to, to_name.as_c_str(), flags)?;
        self.note_move(&to, to_parent, to_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_move(&from, from_parent, from_name);
        }
        Ok(())
    }

    /// What is there now was somewhere else.
    fn note_move(&self, directory: impl AsFd, parent: u64, name: Name<'_>) {
        // Gone again at worst.
        if let Ok(stat) = host::stat_at(directory, name) {
            let name = name.as_c_str().to_owned();
            let place = Place { parent, name };
            self.nodes.lock().moved(&FileId::of(&stat), place);
        }
    }

    pub(crate) fn link(&self, call: &mut Call<'_>) -> Result<(), Errno> {
        self.must_be_changeable(call.header.node)?;
        let old = call.args.u64()?;
        let name = call.args.name()?;
        let (file, kind) = self.node(old)?;
        if kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let directory = self.directory(call.header.node)?;
        // What is followed is the descriptor, not a symbolic link that it may stand for.
        let flags = AtFlags::SYMLINK_FOLLOW;
        let links = self.links.folder();
        linkat(
            links,
            DecInt::from_fd(&file),
            &directory,
            name.as_c_str(),
            flags,
        )?;
        let (found, stat) = host::hold(&self.links, &file)?;
        let node = self.enter(call.header.node, found, name)?;
        self.put_entry(call.reply, node, &stat);
        Ok(())
    }
}
